"""Blocks of inputs that share a scale, and codes of four bits in bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from jlora._types import Array, Float

_HUGE = np.float32(2.0**120)


def split_blocks(w: Shaped[Array, ...], size: int, axis: int) -> Shaped[Array, ...]:
    """Return an array whose axis is split into (blocks, size); zeros fill the last one.

    Args:
        w: [..., m, n] or [..., n, m].
        size: inputs in a block.
        axis: static, of the inputs, -1 or -2. It is the axis within a block afterwards.
    """
    num_missing = -w.shape[axis] % size
    if num_missing:
        padding = [(0, 0)] * w.ndim
        padding[axis] = (0, num_missing)
        w = jnp.pad(w, padding)
    # No -1 in the shape, which is undefined for an empty batch.
    shape = list(w.shape)
    shape[axis : axis + 1 or None] = [w.shape[axis] // size, size]
    return w.reshape(shape)


def join_blocks(
    blocks: Shaped[Array, ...], num_inputs: int, axis: int
) -> Shaped[Array, ...]:
    """Return the array of the blocks, without the inputs that fill the last one."""
    shape = list(blocks.shape)
    joined = shape[axis - 1] * shape[axis]
    shape[axis - 1 : axis + 1 or None] = [joined]
    return jax.lax.slice_in_dim(blocks.reshape(shape), 0, num_inputs, axis=axis)


def scale_blocks(
    blocks: Float[Array, ...], axis: int
) -> tuple[Float[Array, ...], Float[Array, ...]]:
    """Return (blocks scaled to ±1, the largest entry of each)."""
    largest = find_largest(jnp.abs(blocks), axis)
    # A huge block is made smaller first: the inverse of its largest entry would be
    # subnormal, and flushed to zero.
    down = jnp.where(largest > _HUGE, np.float32(2**-8), np.float32(1))
    safe = jnp.where(largest > 0, largest * down, 1)
    # bitsandbytes multiplies by the inverse too, which decides codes at a bound.
    inverse = jnp.where(largest > 0, 1 / safe, 0)
    return blocks * down * inverse, jnp.squeeze(largest, axis)


def find_largest(values: Float[Array, ...], axis: int) -> Float[Array, ...]:
    """Return the largest values along an axis, which stays; NaN counts as Inf.

    XLA's CPU backend drops NaN from a large maximum.
    """
    counted = jnp.where(jnp.isnan(values), jnp.inf, values)
    return jnp.max(counted, axis, keepdims=True)


def to_rows(array: Shaped[Array, ...], axis: int) -> Shaped[Array, "*batch n m"]:
    """Return an array whose inputs are along an axis, -1 or -2, with these last."""
    return array.mT if axis == -2 else array


def pack_halves(codes: Array, axis: int) -> Array:
    """Return bytes of codes below 16: pairs along an axis, the even ones above."""
    size = codes.shape[axis]
    if size % 2:
        padding = [(0, 0)] * codes.ndim
        padding[axis] = (0, 1)
        codes = jnp.pad(codes, padding)
    if axis == -1:
        return (codes[..., 0::2] << 4) | codes[..., 1::2]
    return (codes[..., 0::2, :] << 4) | codes[..., 1::2, :]


def unpack_halves(packed: Array) -> Array:
    """Return codes [..., 2 bytes] of bytes [..., bytes], the inverse."""
    halves = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return halves.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
