"""The scales of blocks, in 32 bits or in 8."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora._types import Array, Float
from jlora.quantization.blocks import join_blocks, scale_blocks, split_blocks
from jlora.quantization.levels import list_dynamic_levels, list_dynamic_midpoints

_NESTED_SIZE = 256  # scales that share one scale of their own


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "largest", "offset"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales [*batch, n, k] in 8 bits: offset + level[code] * largest of its block.

    A block is 256 scales in the order of the rows.

    Source: Dettmers et al., "QLoRA", 2023, section 3, double quantisation.
    """

    codes: Any  # uint8 [*batch, n, k]
    largest: Any  # float32 [*batch, blocks]
    offset: Any  # float32 [*batch]


def nest_scales(scales: Float[Array, "*batch n k"]) -> NestedScales:
    """Return the scales of one matrix, or of a batch, in 8 bits each."""
    *batch, n, k = scales.shape
    offset = jnp.mean(scales, axis=(-2, -1))
    centred = (scales - offset[..., None, None]).reshape(*batch, n * k)

    parts, largest = scale_blocks(split_blocks(centred, _NESTED_SIZE, -1), -1)
    bounds = jnp.asarray(list_dynamic_midpoints())
    codes = jnp.searchsorted(bounds, parts).astype(jnp.uint8)
    codes = join_blocks(codes, n * k, -1)
    return NestedScales(codes.reshape(*batch, n, k), largest, offset)


def read_scales(scales: Any) -> Float[Array, "*batch n k"]:
    """Return scales as float32, nested or not."""
    if not isinstance(scales, NestedScales):
        return scales.astype(jnp.float32)
    *batch, n, k = scales.codes.shape
    flat = scales.codes.reshape(*batch, n * k)
    levels = jnp.asarray(list_dynamic_levels())[flat]
    largest = jnp.repeat(scales.largest, _NESTED_SIZE, axis=-1)[..., : n * k]
    values = levels * largest + scales.offset[..., None]
    return values.reshape(*batch, n, k)
