"""The weights of a quantised base as floats, a block of them at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import matmul_activations
from jlora._types import Array, Float
from jlora.quantization.base import Encoded
from jlora.quantization.quantized_array import QuantizedArray

# Columns of the result that are computed at a time. 512 are 2 % faster on a CPU, but
# need more than a quarter of the memory of a float32 base of 4096² on an H200.
_BLOCK = 256
_LEAST_BLOCK = 128


class Thin(NamedTuple):
    """The product p @ q that is added to a product with a base, of few columns r."""

    p: Float[Array, "t r"]
    q: Float[Array, "r n"]


def multiply_blocks(
    x: Float[Array, "t m"], encoded: Encoded, base: QuantizedArray, thin: Thin | None
) -> Float[Array, "t n"]:
    """Return x @ w + p @ q for one matrix w [m, n], block by block of outputs."""

    def decode(start: Any, size: int) -> Array:
        part = _slice(encoded, start, size, axis=0)
        return base.format.decode(part, base.num_inputs).astype(x.dtype).T

    return _multiply(x, thin, decode, encoded.codes.shape[-2], _BLOCK)


def multiply_transposed_blocks(
    g: Float[Array, "t n"], encoded: Encoded, base: QuantizedArray, thin: Thin | None
) -> Float[Array, "t m"]:
    """Return g @ wᵀ + p @ q for one matrix w [m, n], block by block of inputs."""
    num_inputs, format = base.num_inputs, base.format
    scale_size = format.find_block_size(num_inputs)
    size, has_one_scale = _choose_block(num_inputs, scale_size)
    per_byte = format.codes_per_byte
    one_scale = dataclasses.replace(format, block_size=None)

    def decode(start: Any, count: int) -> Array:
        num_scales = 1 if has_one_scale else -(-count // scale_size)
        num_bytes = -(-count // per_byte)
        scales, zeros = (
            part
            if part is None
            else _slice(part, start // scale_size, num_scales, axis=1)
            for part in (encoded.scales, encoded.zeros)
        )
        codes = _slice(encoded.codes, start // per_byte, num_bytes, axis=1)
        chosen = one_scale if has_one_scale else format
        rows = chosen.decode(Encoded(codes, scales, zeros), count)
        return rows.astype(g.dtype)

    return _multiply(g, thin, decode, num_inputs, size)


def _choose_block(num_inputs: int, scale_size: int) -> tuple[int, bool]:
    """Return (inputs in a block, whether all of them have one scale).

    A block starts where a byte and a scale start, or lies within the inputs of a scale.
    """
    if scale_size >= num_inputs:
        return _BLOCK, True
    part = math.gcd(scale_size, _BLOCK)
    if scale_size > _BLOCK and part >= _LEAST_BLOCK:
        return part, True
    size = scale_size * -(-_BLOCK // scale_size)
    return size * (1 + size % 2), False


def _multiply(
    x: Float[Array, "t k"],
    thin: Thin | None,
    decode: Callable[[Any, int], Float[Array, "k size"]],
    num_columns: int,
    size: int,
) -> Float[Array, "t n"]:
    """Return x @ w + p @ q, decoding some columns of w at a time.

    Args:
        x: left operand.
        thin: the product to be added. None: none.
        decode: function of a first column and a number of columns.
        num_columns: columns n of w.
        size: columns to decode at a time.
    """

    def multiply_block(start: Any, size: int) -> Array:
        block = matmul_activations(x, decode(start, size))
        if thin is not None:
            q = _slice(thin.q, start, size, axis=1)
            block += matmul_activations(thin.p, q).astype(block.dtype)
        return block.astype(x.dtype)

    def write(index: Array, y: Array) -> Array:
        start = index * size
        return jax.lax.dynamic_update_slice(y, multiply_block(start, size), (0, start))

    if num_columns <= size:
        return multiply_block(0, num_columns)
    num_blocks, num_left = divmod(num_columns, size)
    y = jnp.zeros((len(x), num_columns), x.dtype)
    y = jax.lax.fori_loop(0, num_blocks, write, y)
    if not num_left:
        return y
    start = num_blocks * size
    return y.at[:, start:].set(multiply_block(start, num_left))


def _slice(tree: Any, start: Any, size: int, axis: int) -> Any:
    """Return a part of each array along an axis."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, size, axis), tree
    )
