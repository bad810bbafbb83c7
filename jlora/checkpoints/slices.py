"""Blocks of stored arrays: a range of every axis, read without the rest of the file."""

from __future__ import annotations

import io
import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np

from jlora.checkpoints.stored_arrays import (
    SafetensorsArray,
    StoredArray,
    fill,
    make_aligned,
    open_unchanged,
)

# Shorter ranges are read with the bytes between them: the system reads whole pages.
_MIN_RUN_BYTES = 2**12
_MAX_READ_BYTES = 2**26  # that are read at once to keep a part of them

Bounds = Sequence[tuple[int, int]]  # (start, stop) of each axis


def find_bounds(
    index: Sequence[slice], shape: tuple[int, ...], name: str
) -> list[tuple[int, int]]:
    """Return (start, stop) of each axis, of slices without steps."""
    if len(index) > len(shape) or not all(isinstance(each, slice) for each in index):
        raise ValueError(
            f"`index` must have a slice for each of at most {len(shape)} axes of "
            f"{name}, got {tuple(index)}. Use start:stop."
        )

    padded = (*index, *[slice(None)] * (len(shape) - len(index)))
    bounds = []
    for part, size in zip(padded, shape, strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(
                f"`index` must have slices without a step, got {part} for {name}. "
                "Read the range, and take every so many of it."
            )
        bounds.append((start, max(start, stop)))
    return bounds


def read_block(array: StoredArray, bounds: Bounds) -> np.ndarray:
    """Return a block of an array, which owns its memory.

    Only its bytes are read from .safetensors files, short ranges with the bytes between
    them. Of the other formats whole rows are read.
    """
    if not array.shape:
        return array.read_rows(0, 1)
    if isinstance(array, SafetensorsArray):
        with open_unchanged(array.state) as file:
            return _read_runs(file, array, bounds)
    rows = array.read_rows(*bounds[0])
    block = rows[:, *(slice(*each) for each in bounds[1:])]
    return block if block.shape == rows.shape else block.copy()


def _read_runs(file: io.FileIO, array: SafetensorsArray, bounds: Bounds) -> np.ndarray:
    """Return a block of a tensor, whose bytes lie in runs of one length."""
    dtype, shape = array.check_dtype(), array.shape
    sizes = [stop - start for start, stop in bounds]
    block = make_aligned(sizes, dtype)
    if block.size == 0:
        return block

    # The axes after the last one that is read in part are contiguous.
    parts = [i for i, each in enumerate(bounds) if each != (0, shape[i])]
    axis = parts[-1] if parts else 0
    run_bytes = math.prod(sizes[axis:]) * dtype.itemsize
    if axis == 0 or run_bytes >= _MIN_RUN_BYTES:
        _fill_runs(
            block.reshape(-1, math.prod(sizes[axis:])), file, array, bounds, axis
        )
        return block

    # Short runs: read the whole of that axis for some entries of the first one.
    wide = [*bounds[:axis], (0, shape[axis]), *bounds[axis + 1 :]]
    entry_bytes = math.prod(stop - start for start, stop in wide[1:]) * dtype.itemsize
    step = max(1, _MAX_READ_BYTES // entry_bytes)
    start, stop = bounds[0]
    own = (*[slice(None)] * axis, slice(*bounds[axis]))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows = _read_runs(file, array, [(first, last), *wide[1:]])
        block[first - start : last - start] = rows[own]
    return block


def _fill_runs(
    runs: np.ndarray,
    file: io.FileIO,
    array: SafetensorsArray,
    bounds: Bounds,
    axis: int,
) -> None:
    """Read a run into each row: one for each place on the axes before `axis`."""
    strides = [math.prod(array.shape[i + 1 :]) for i in range(axis + 1)]
    places = itertools.product(*(range(*each) for each in bounds[:axis]))
    for run, place in zip(runs, places, strict=True):
        first = sum(map(operator.mul, (*place, bounds[axis][0]), strides))
        file.seek(array.entry.start + first * runs.itemsize)
        if not fill(run, file):
            raise ValueError(
                f"{array.file}: ended within {array.name}. Download it again."
            )
