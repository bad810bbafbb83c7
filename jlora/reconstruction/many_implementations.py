"""Implementations of `apply_many`: an adapter gathered for each row, or rows sorted."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jlora._dispatch import Implementation, can_always
from jlora._numerics import matmul_activations
from jlora._types import Array, Float, Int
from jlora.reconstruction.row_blocks import count_blocks, sort_into_blocks


def _is_gain_gather(
    platform: str, rows: Array, u: Array, v: Array, scale: Array, index: Array
) -> bool:
    # Sorting copies an adapter for each block instead of each row, and sorts.
    return len(rows) <= 2 * count_blocks(len(rows), len(u))


def _is_gain_sort(platform: str, *arguments: Any) -> bool:
    return True


def _apply_gathered(
    rows: Float[Array, "t m"],
    u: Float[Array, "a m r"],
    v: Float[Array, "a r n"],
    scale: Float[Array, " a"],
    index: Int[Array, " t"],
) -> Float[Array, "t n"]:
    """Return each row times the adapter that is gathered for it."""
    group = _mark_unused(index, len(u))
    rows = jnp.where((group < len(u))[:, None], rows, 0)
    thin = matmul_activations(rows[:, None, :], _take_adapters(u, group))
    thin = thin * _take_adapters(scale, group)[:, None, None]
    return matmul_activations(thin.astype(v.dtype), _take_adapters(v, group))[:, 0]


def _mark_unused(index: Int[Array, " t"], num_adapters: int) -> Int[Array, " t"]:
    """Return the index with num_adapters in place of every number of no adapter."""
    is_used = (index >= 0) & (index < num_adapters)
    return jnp.where(is_used, index, num_adapters)


def _take_adapters(arrays: Float[Array, "a ..."], group: Int[Array, " k"]) -> Array:
    """Return the arrays of the given adapters, and zeros for the number of none.

    Zeros instead of any adapter: 0 * NaN of an adapter that no row uses would reach the
    gradients of the rows without one.
    """
    return arrays.at[group].get(mode="fill", fill_value=0)


def _apply_sorted(
    rows: Float[Array, "t m"],
    u: Float[Array, "a m r"],
    v: Float[Array, "a r n"],
    scale: Float[Array, " a"],
    index: Int[Array, " t"],
) -> Float[Array, "t n"]:
    """Return the same, with the rows sorted into blocks of one adapter each."""
    group = _mark_unused(index, len(u))
    layout = sort_into_blocks(group, len(u))
    rows = jnp.where((group < len(u))[:, None], rows, 0)

    # Multiply block by block; a slot without a row holds zeros.
    padded = rows.at[layout.source].get(mode="fill", fill_value=0)
    num_slots, num_blocks = len(layout.source), len(layout.adapter)
    shape = num_blocks, num_slots // max(num_blocks, 1), rows.shape[-1]
    thin = matmul_activations(padded.reshape(shape), _take_adapters(u, layout.adapter))
    thin = thin * _take_adapters(scale, layout.adapter)[:, None, None]
    thin = thin.astype(v.dtype)
    delta = matmul_activations(thin, _take_adapters(v, layout.adapter))

    # Bring the rows back into their order.
    delta = delta.reshape(num_slots, v.shape[-1])
    return delta.at[layout.slot_of_row].get(mode="fill", fill_value=0)


IMPLEMENTATIONS = (
    Implementation("gather", can_always, _is_gain_gather, _apply_gathered),
    Implementation("sort", can_always, _is_gain_sort, _apply_sorted),
)
