"""Random test matrices from a key."""

import jax
import jax.numpy as jnp


def gaussian_sketch(key, num_rows, num_columns, dtype, batch=()):
    """Return a Gaussian test matrix [*batch, num_rows, num_columns]; `key` is consumed.

    One is drawn: every matrix of a batch meets the same test matrix, so that its result does not
    depend on what else is in the batch.
    """
    omega = jax.random.normal(key, (num_rows, num_columns), dtype)
    return jnp.broadcast_to(omega, (*batch, num_rows, num_columns))
