"""Test matrices: random from a key, or fixed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlora._types import Array, DTypeLike, Float, PRNGKey, UInt


def gaussian_sketch(
    key: PRNGKey, num_rows: int, num_columns: int, dtype: DTypeLike
) -> Float[Array, "num_rows num_columns"]:
    """Return a standard normal test matrix. `key` is consumed.

    All matrices of a batch share one test matrix, so that a result does not depend on
    the rest of the batch.
    """
    return jax.random.normal(key, (num_rows, num_columns), dtype)


def fixed_sketch(
    num_rows: int, num_columns: int, dtype: DTypeLike
) -> Float[Array, "num_rows num_columns"]:
    """Return a matrix without structure that is the same in every call.

    For functions that take no key and need a little generic noise, not randomness.
    """
    # From the indices of both axes, so that each device makes its own part.
    rows = jnp.arange(num_rows, dtype=jnp.uint32)[:, None]
    columns = jnp.arange(1, num_columns + 1, dtype=jnp.uint32)[None, :]
    return hash_uniform(rows * jnp.uint32(num_columns) + columns, dtype)


def hash_uniform(x: UInt[Array, ...], dtype: DTypeLike) -> Float[Array, ...]:
    """Return unrelated numbers for the given ones, uniform with mean 0 and variance 1.

    Source: the mixing steps of MurmurHash3 (Appleby).
    """
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    uniform = (x ^ (x >> 16)).astype(dtype) / jnp.asarray(2.0**32, dtype)
    return (12**0.5 * (uniform - 0.5)).astype(dtype)
