"""Rows sorted into blocks of one adapter each, for `apply_many`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jlora._types import Array, Int

_LEAST_BLOCK_ROWS, _MOST_BLOCK_ROWS = 16, 64


class RowLayout(NamedTuple):
    """Where the rows of each adapter stand once they are sorted into blocks."""

    source: Int[Array, " slots"]  # the row in each slot; the number of rows: none
    slot_of_row: Int[Array, " t"]
    adapter: Int[Array, " blocks"]  # of each block; the number of adapters: none


def sort_into_blocks(group: Int[Array, " t"], num_adapters: int) -> RowLayout:
    """Return the layout of rows of the given adapters; num_adapters stands for none.

    The rows of each adapter start a new block. The number of blocks is static.
    """
    num_rows = len(group)
    block_rows = _choose_block_rows(num_rows, num_adapters)
    num_blocks = count_blocks(num_rows, num_adapters)

    # Count the blocks of each adapter; rows without one come last.
    counts = jnp.bincount(group, length=num_adapters + 1)
    blocks = -(-counts // block_rows)
    last_block = jnp.cumsum(blocks)

    # The slot of each row: its adapter's first slot, and its position among its rows.
    order = jnp.argsort(group)
    sorted_group = group[order]
    first_row = (jnp.cumsum(counts) - counts)[sorted_group]
    position = jnp.arange(num_rows) - first_row
    slot = (last_block - blocks)[sorted_group] * block_rows + position

    # Only rows without an adapter may get a slot beyond the end, which is dropped.
    num_slots = num_blocks * block_rows
    source = jnp.full(num_slots, num_rows).at[slot].set(order, mode="drop")
    slot_of_row = jnp.zeros_like(slot).at[order].set(slot)

    numbers = jnp.arange(num_blocks)
    adapter = jnp.searchsorted(last_block[:-1], numbers, side="right")
    return RowLayout(source, slot_of_row, adapter)


def _choose_block_rows(num_rows: int, num_adapters: int) -> int:
    """Return the power of two above an adapter's average number of rows, limited."""
    average = max(-(-num_rows // num_adapters), 1)
    power = 1 << (average - 1).bit_length()
    return min(max(power, _LEAST_BLOCK_ROWS), _MOST_BLOCK_ROWS)


def count_blocks(num_rows: int, num_adapters: int) -> int:
    """Return the largest number of blocks: full ones, and a rest per adapter."""
    whole = -(-num_rows // _choose_block_rows(num_rows, num_adapters))
    return whole + min(num_adapters, num_rows)
