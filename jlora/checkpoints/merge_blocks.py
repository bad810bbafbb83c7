"""Changed tensors of a checkpoint, some rows at a time."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.adaptation.paths import fold_path
from jlora.checkpoints.changes import Change
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.merge_plan import OutputTensor
from jlora.checkpoints.output_folder import copy_range, write_array
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.safetensors import find_dtype, format_header
from jlora.factors import Factors
from jlora.reconstruction.dense import reconstruct

# Entries of a matrix that are merged at once; float32 temporaries of it exist.
_BLOCK = 2**22
WORK_BYTES = 32 * _BLOCK  # of all temporaries


def write_tensors(
    checkpoint: Checkpoint,
    path: pathlib.Path,
    plan: Sequence[OutputTensor],
    file: BinaryIO,
    *,
    rounding: str = "nearest",
    key: PRNGKey | None = None,
    bar: Progress | None = None,
) -> None:
    """Write one safetensors file: the header, then each tensor in its place.

    Args:
        checkpoint: of the inputs.
        path: its file that holds the tensors.
        plan: the tensors, in the order of their data.
        file: open for writing.
        rounding: of the sums, see `reconstruct`.
        key: for "stochastic", folded with the name of each tensor.
        bar: shows the tensors. None: none.
    """
    entries = [(t.name, t.dtype, t.shape, t.num_bytes) for t in plan]
    file.write(format_header(entries))
    with open(path, "rb") as source:
        for tensor in plan:
            if bar is not None:
                bar.count(1, tensor.num_bytes)
            if tensor.change is None:
                assert tensor.source is not None
                place = checkpoint.locate(tensor.source)
                copy_range(source.fileno(), file, place.start, place.num_bytes)
                continue
            own_key = None if key is None else fold_path(key, tensor.name)
            for block in _merge_tensor(checkpoint, tensor, rounding, own_key):
                write_array(file, block)


def _merge_tensor(
    checkpoint: Checkpoint, tensor: OutputTensor, rounding: Any, key: PRNGKey | None
) -> Iterator[np.ndarray]:
    """Yield the rows of a changed tensor, block by block."""
    change = tensor.change
    assert change is not None
    if change.value is not None:
        dtype = find_dtype(tensor.dtype)
        yield np.asarray(change.value, dtype)
        return
    assert tensor.source is not None

    num_rows = tensor.shape[0] if tensor.shape else 1
    row_size = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, _BLOCK // max(row_size, 1))
    if change.magnitude is not None and not change.outputs_first:
        step = num_rows  # the norm of an output needs all the inputs
    for start in range(0, num_rows, step):
        block = checkpoint.read_rows(tensor.source, start, start + step)
        own_key = None if key is None else jax.random.fold_in(key, start)
        with jax.enable_x64(block.dtype == np.float64):
            yield _merge_rows(block, change, start, rounding, own_key, tensor.name)


def _merge_rows(
    block: np.ndarray,
    change: Change,
    start: int,
    rounding: Any,
    key: PRNGKey | None,
    name: str,
) -> np.ndarray:
    """Return some rows of a tensor, changed, in its dtype."""
    dtype, stop = block.dtype, start + len(block)
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)

    if change.pairs:
        pair = _take_rows(change.pairs, start, stop, wide)
        if change.magnitude is None and change.addend is None:
            merged = reconstruct(pair, block, rounding=rounding, key=key)
        else:
            merged = reconstruct(pair, block.astype(wide))
        block = np.asarray(merged)
    if change.magnitude is not None:
        block = _scale_outputs(block, change, start, stop).astype(dtype)
    if change.addend is not None:
        block = (block.astype(wide) + change.addend[start:stop]).astype(dtype)
    if change.rows is not None:
        block = block.copy()
        for index, row in zip(*change.rows, strict=True):
            if start <= index < stop:
                block[index - start] = row.astype(dtype)

    if not np.isfinite(block).all():
        raise ValueError(
            f"{name}: must stay finite in {dtype}, got NaN or Inf. Check the adapter, "
            "or cast the model to float32 first."
        )
    return block


def _take_rows(
    pairs: Sequence[Factors], start: int, stop: int, dtype: np.dtype
) -> Factors:
    """Return rows start to stop of the sum of factors, as one pair."""
    if pairs[0].u.ndim == 3:  # stacked experts: the first axis is theirs
        us = [pair.u[start:stop] for pair in pairs]
        vs = [pair.v[start:stop] for pair in pairs]
    else:
        us, vs = [pair.u[start:stop] for pair in pairs], [pair.v for pair in pairs]
    u = np.concatenate([part.astype(dtype) for part in us], -1)
    v = np.concatenate([part.astype(dtype) for part in vs], -2)
    return make_pair(u, v)


def _scale_outputs(
    block: np.ndarray, change: Change, start: int, stop: int
) -> np.ndarray:
    """Return the block with the norm of each output set to its magnitude (DoRA)."""
    assert change.magnitude is not None
    axis = 1 if change.outputs_first else 0
    norm = np.linalg.norm(block, axis=axis, keepdims=True)
    magnitude = change.magnitude
    magnitude = magnitude[start:stop] if change.outputs_first else magnitude
    return block * (np.expand_dims(magnitude, axis).astype(block.dtype) / norm)
