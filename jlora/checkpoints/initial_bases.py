"""The base of a checkpoint without the deltas of its first factors."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from jlora._progress import Progress
from jlora.adaptation.programs import InitSpec, has_new_base
from jlora.checkpoints.changes import Change, take_slice
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.folders import find_side_files
from jlora.checkpoints.initial_factors import make_initial_reader
from jlora.checkpoints.lazy_tensors import LazyTensor
from jlora.checkpoints.merge_blocks import write_tensors
from jlora.checkpoints.merge_plan import OutputTensor, plan_files
from jlora.checkpoints.modules import MatrixRef, StoredModule
from jlora.checkpoints.output_folder import OutputFolder, copy_file
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.quantized_bases import (
    make_quantized_side_file,
    plan_quantized_files,
)
from jlora.checkpoints.window_store import WindowStore
from jlora.initializers.base import Initializer
from jlora.quantization.base import Format

Plans: TypeAlias = dict[pathlib.Path, list[OutputTensor]]  # tensors of each file


def has_moved(
    initializer: Initializer, modules: Iterable[StoredModule], format: Format | None
) -> bool:
    """Return whether a method gives any of the modules another base."""
    return any(_moves(initializer, module, format) for module in modules)


def write_bases(
    folder: OutputFolder,
    source: Checkpoint,
    modules: Iterable[StoredModule],
    initializer: Initializer,
    store: WindowStore,
    format: Format | None,
    progress: bool | None,
) -> Plans:
    """Write the checkpoint without the deltas of the first factors.

    Each weight is w - u @ v, rounded once; a quantised method gives its own base. With
    a format the bases are stored in it. The other tensors are copied byte for byte.

    Returns:
        The tensors of each file with a format, and else none.
    """
    modules = [module for module in modules if _moves(initializer, module, format)]
    plans: Plans = {}
    if format is not None:
        plans = plan_quantized_files(source, modules, store, format)

    total = len(source.files)
    with Progress("base", total, enabled=progress, unit="files") as bar:
        for number, path in enumerate(source.files):
            name = path.name if source.path.is_dir() else "model.safetensors"
            name = f"base/{name}"
            if folder.owns(number, total) and not folder.has(name):
                plan = plans.get(path)
                if plan is None:
                    changes = _find_changes(source, path, modules, initializer, store)
                    plan = plan_files(source, changes, None)[path]
                folder.write(name, functools.partial(write_tensors, source, path, plan))
            bar.count()
    return plans


def write_side_files(
    folder: OutputFolder,
    source: Checkpoint,
    modules: Sequence[StoredModule],
    initializer: Initializer,
    plans: Plans,
    format: Format | None,
) -> None:
    """Write the files of the base that hold no tensors, if the model is a folder."""
    modules = [module for module in modules if _moves(initializer, module, format)]
    for path in find_side_files(source.path) if source.path.is_dir() else ():
        write = functools.partial(copy_file, path)
        if format is not None:
            write = make_quantized_side_file(source, path, plans, modules, format)
        folder.write(f"base/{path.name}", write)


def _moves(
    initializer: Initializer, module: StoredModule, format: Format | None
) -> bool:
    shape = module.shape if module.layout == "io" else module.shape[::-1]
    spec = InitSpec(initializer, initializer.rank_multiple, module.layout, format)
    return has_new_base(spec, shape, np.dtype(module.dtype), None)


def _find_changes(
    source: Checkpoint,
    path: pathlib.Path,
    modules: Iterable[StoredModule],
    initializer: Initializer,
    store: WindowStore,
) -> dict[str, Change]:
    """Return the changes of the tensors of one file."""
    read = make_initial_reader(store, modules)
    changes: dict[str, Change] = {}
    for module in modules:
        pieces = [p for p in module.pieces if source.info(p.tensor).file == path]
        if not pieces:
            continue
        factors = read(module.path)
        for piece in pieces:
            if not initializer.has_residual_base:
                ref = MatrixRef(module, 0)
                base = LazyTensor(store.open_window(ref), f"{ref.name}/base")
                changes[piece.tensor] = Change([], value=base)
                continue
            u, v = take_slice(factors, piece)
            pair = make_pair(-u, v)
            if module.layout == "oi":
                pair = make_pair(v.swapaxes(-1, -2), -u.swapaxes(-1, -2))
            changes[piece.tensor] = Change([pair])
    return changes
