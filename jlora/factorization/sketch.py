"""Random test matrices from a key."""

import jax


def gaussian_sketch(key, num_rows, num_columns, dtype):
    """Return a Gaussian test matrix [num_rows, num_columns]; `key` is consumed.

    It has no batch axes: every matrix of a batch meets the same test matrix, so that its
    result does not depend on what else is in the batch.
    """
    return jax.random.normal(key, (num_rows, num_columns), dtype)
