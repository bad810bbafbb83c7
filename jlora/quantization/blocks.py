"""Blocks of inputs that share a scale, and codes of four bits in bytes."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Shaped

from jlora._types import Array, Float


def split_blocks(
    rows: Shaped[Array, "*rows m"], size: int
) -> Shaped[Array, "*rows k size"]:
    """Return the inputs in blocks of a size; zeros fill the last one."""
    *front, num_inputs = rows.shape
    missing = -num_inputs % size
    padding = [(0, 0)] * len(front) + [(0, missing)]
    # No -1, which is undefined for an empty batch.
    shape = *front, (num_inputs + missing) // size, size
    return jnp.pad(rows, padding).reshape(shape)


def scale_blocks(
    blocks: Float[Array, "*blocks size"],
) -> tuple[Float[Array, "*blocks size"], Float[Array, "*blocks"]]:
    """Return (blocks scaled to ±1, the largest entry of each)."""
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    # bitsandbytes multiplies by the inverse too, which decides codes at a bound.
    inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    return blocks * inverse[..., None], largest


def join_blocks(
    blocks: Shaped[Array, "*rows k size"], num_inputs: int
) -> Shaped[Array, "*rows m"]:
    """Return the rows of the blocks, without the inputs that fill the last one."""
    *front, num_blocks, size = blocks.shape
    return blocks.reshape(*front, num_blocks * size)[..., :num_inputs]


def pack_halves(codes: Array) -> Array:
    """Return bytes [..., ⌈m / 2⌉] of codes [..., m] below 16, the even ones above."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return (codes[..., 0::2] << 4) | codes[..., 1::2]


def unpack_halves(packed: Array) -> Array:
    """Return codes [..., 2 bytes] of bytes [..., bytes], the inverse."""
    halves = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
