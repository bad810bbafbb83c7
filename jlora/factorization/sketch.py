"""Test matrices: random from a key, or fixed."""

import jax
import jax.numpy as jnp


def gaussian_sketch(key, num_rows, num_columns, dtype):
    """Return a Gaussian test matrix [num_rows, num_columns]; `key` is consumed.

    Every matrix of a batch meets the same one, so that its result does not depend on what else
    is in the batch.
    """
    return jax.random.normal(key, (num_rows, num_columns), dtype)


def fixed_sketch(num_rows, num_columns, dtype):
    """Return a matrix [num_rows, num_columns] of no structure, the same each time.

    For functions that take no key and need a trace of something generic, nothing random.
    """
    # The mixing steps of MurmurHash3 (Appleby): neighbours share no bits.
    x = jnp.arange(1, num_rows * num_columns + 1, dtype=jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    unit = (x ^ (x >> 16)).astype(dtype) / jnp.asarray(2.0**32, dtype)
    spread = (12**0.5 * (unit - 0.5)).astype(dtype)  # of variance one
    return spread.reshape(num_rows, num_columns)
