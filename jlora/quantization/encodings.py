"""How codes and scales of few bits stand for the rows of a weight.

A row holds the weights of one output, so that a block of inputs is contiguous, as in
the files of bitsandbytes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Array, Float
from jlora.quantization.base import Encoded, Format
from jlora.quantization.blocks import (
    find_largest,
    join_blocks,
    pack_halves,
    scale_blocks,
    split_blocks,
    to_rows,
    unpack_halves,
)
from jlora.quantization.levels import (
    list_fp8_levels,
    list_nf4_midpoints,
    list_nf4_pairs,
)
from jlora.quantization.scales import nest_scales

_INT8_STEPS = 127
_INT4_STEPS = 15
_FP8_EXPONENT = 8  # the largest number, 448, is below 2 to the power of 9


class Blocks(NamedTuple):
    """Blocks of inputs, each scaled to ±1 by its largest entry."""

    parts: Float[Array, ...]
    largest: Float[Array, "*batch n k"]  # NaN where the block is not finite


@dataclasses.dataclass(frozen=True)
class NF4(Format):
    """See `nf4`."""

    block_size: int | None = 64
    double_quant: bool = True

    name = "nf4"
    codes_per_byte = 2

    def encode(self, w: Float[Array, ...], axis: int) -> Encoded:
        num_inputs = w.shape[axis]
        parts, largest = _scale_blocks(w, self.find_block_size(num_inputs), axis)
        # Fifteen comparisons of all entries at once: four times as fast as bisection on
        # a CPU.
        bounds = jnp.asarray(list_nf4_midpoints())
        codes = jnp.searchsorted(bounds, parts, method="compare_all")
        codes = join_blocks(codes.astype(jnp.uint8), num_inputs, axis)
        packed = to_rows(pack_halves(codes, axis), axis)
        return Encoded(packed, nest_scales(largest) if self.double_quant else largest)

    def decode(self, encoded: Encoded, num_inputs: int) -> Float[Array, "*batch n m"]:
        pairs = jnp.asarray(list_nf4_pairs())[encoded.codes]
        *front, num_bytes = encoded.codes.shape
        levels = pairs.reshape(*front, 2 * num_bytes)[..., :num_inputs]
        return _multiply_blocks(levels, encoded.scales, self)


class Int8(Format):
    """See `int8`."""

    name = "int8"

    def encode(self, w: Float[Array, ...], axis: int) -> Encoded:
        num_inputs = w.shape[axis]
        parts, largest = _scale_blocks(w, self.find_block_size(num_inputs), axis)
        codes = jnp.round(parts * _INT8_STEPS).astype(jnp.int8)
        return Encoded(to_rows(join_blocks(codes, num_inputs, axis), axis), largest)

    def decode(self, encoded: Encoded, num_inputs: int) -> Float[Array, "*batch n m"]:
        del num_inputs
        # Divided first, so that the largest entry is exact.
        parts = encoded.codes.astype(jnp.float32) / _INT8_STEPS
        return _multiply_blocks(parts, encoded.scales, self)


@dataclasses.dataclass(frozen=True)
class Int4(Format):
    """See `int4`."""

    block_size: int | None = 128

    name = "int4"
    codes_per_byte = 2

    def encode(self, w: Float[Array, ...], axis: int) -> Encoded:
        num_inputs = w.shape[axis]
        blocks = split_blocks(w, self.find_block_size(num_inputs), axis)
        # The maximum below turns NaN into Inf, as in every other format.
        low = jnp.minimum(jnp.min(blocks, axis, keepdims=True), 0)
        high = jnp.maximum(find_largest(blocks, axis), 0)

        # Rounded down: then the codes reach from 0 to 15, and a second round trip gives
        # the same scale.
        steps = _truncate_to_bfloat16((high - low) / _INT4_STEPS)
        safe = jnp.where(steps > 0, steps, 1)
        zeros = -_round_half_up(low / safe)
        codes = _round_half_up(blocks / safe) + zeros
        codes = jnp.clip(codes, 0, _INT4_STEPS).astype(jnp.uint8)

        is_finite = jnp.isfinite(high - low)
        scales = jnp.where(is_finite, steps, jnp.nan).astype(jnp.bfloat16)
        packed = pack_halves(join_blocks(codes, num_inputs, axis), axis)
        scales, zeros = (
            to_rows(jnp.squeeze(part, axis), axis)
            for part in (scales, zeros.astype(jnp.uint8))
        )
        return Encoded(to_rows(packed, axis), scales, zeros)

    def decode(self, encoded: Encoded, num_inputs: int) -> Float[Array, "*batch n m"]:
        assert encoded.zeros is not None
        codes = unpack_halves(encoded.codes)[..., :num_inputs].astype(jnp.float32)
        size = self.find_block_size(num_inputs)
        blocks = split_blocks(codes, size, -1)
        blocks = blocks - encoded.zeros.astype(jnp.float32)[..., None]
        rows = join_blocks(blocks, num_inputs, -1)
        return _multiply_blocks(rows, encoded.scales, self)


class FP8(Format):
    """See `fp8`."""

    name = "fp8"

    def encode(self, w: Float[Array, ...], axis: int) -> Encoded:
        num_inputs = w.shape[axis]
        blocks = split_blocks(w, self.find_block_size(num_inputs), axis)
        largest = find_largest(jnp.abs(blocks), axis)

        # largest is between half of 2 to the exponent and all of it.
        _, exponent = jnp.frexp(largest)
        scales = jnp.ldexp(jnp.ones_like(largest), exponent - _FP8_EXPONENT)
        scales = jnp.where(jnp.isfinite(largest), scales, jnp.nan)
        parts = blocks / jnp.where(scales > 0, scales, 1)
        numbers = join_blocks(parts.astype(jnp.float8_e4m3fn), num_inputs, axis)
        codes = jax.lax.bitcast_convert_type(numbers, jnp.uint8)
        return Encoded(to_rows(codes, axis), to_rows(jnp.squeeze(scales, axis), axis))

    def decode(self, encoded: Encoded, num_inputs: int) -> Float[Array, "*batch n m"]:
        del num_inputs
        # A table: from an array of float8 itself, XLA's CPU backend makes a whole copy
        # in 16 bits.
        parts = jnp.asarray(list_fp8_levels())[encoded.codes]
        return _multiply_blocks(parts, encoded.scales, self)


def _scale_blocks(w: Float[Array, ...], size: int, axis: int) -> Blocks:
    parts, largest = scale_blocks(split_blocks(w, size, axis), axis)
    largest = jnp.where(jnp.isfinite(largest), largest, jnp.nan)
    return Blocks(parts, to_rows(largest, axis))


def _multiply_blocks(
    rows: Float[Array, "*batch n m"],
    scales: Float[Array, "*batch n k"],
    format: Format,
) -> Float[Array, "*batch n m"]:
    num_inputs = rows.shape[-1]
    blocks = split_blocks(rows, format.find_block_size(num_inputs), -1)
    scaled = blocks * scales.astype(jnp.float32)[..., None]
    return join_blocks(scaled, num_inputs, -1)


def _truncate_to_bfloat16(values: Array) -> Array:
    """Return float32 values without the bits that bfloat16 has no room for."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)


def _round_half_up(values: Array) -> Array:
    return jnp.floor(values + 0.5)
