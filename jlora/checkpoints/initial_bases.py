"""The base of a checkpoint without the deltas of its first factors."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable

import numpy as np

from jlora._progress import Progress
from jlora.adaptation.programs import InitSpec, has_new_base
from jlora.checkpoints.changes import Change, take_slice
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.folders import find_side_files
from jlora.checkpoints.initial_factors import make_initial_reader
from jlora.checkpoints.lazy_tensors import LazyTensor
from jlora.checkpoints.merge_blocks import write_tensors
from jlora.checkpoints.merge_plan import plan_files
from jlora.checkpoints.modules import MatrixRef, StoredModule
from jlora.checkpoints.output_folder import OutputFolder, copy_file
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.window_store import WindowStore
from jlora.initializers.base import Initializer


def has_moved(initializer: Initializer, modules: Iterable[StoredModule]) -> bool:
    """Return whether a method gives any of the modules another base."""
    return any(_moves(initializer, module) for module in modules)


def write_bases(
    folder: OutputFolder,
    source: Checkpoint,
    modules: Iterable[StoredModule],
    initializer: Initializer,
    store: WindowStore,
    progress: bool | None,
) -> None:
    """Write the checkpoint without the deltas of the first factors.

    Each weight is w - u @ v, rounded once; a quantised method gives its own base. The
    other tensors are copied byte for byte.
    """
    modules = [module for module in modules if _moves(initializer, module)]
    is_folder = source.path.is_dir()
    with Progress("base", len(source.files), enabled=progress, unit="files") as bar:
        for path in source.files:
            name = f"base/{path.name if is_folder else 'model.safetensors'}"
            if not folder.has(name):
                changes = _find_changes(source, path, modules, initializer, store)
                plan = plan_files(source, changes, None)[path]
                folder.write(name, functools.partial(write_tensors, source, path, plan))
            bar.count()
    for path in find_side_files(source.path) if is_folder else ():
        folder.write(f"base/{path.name}", functools.partial(copy_file, path))


def _moves(initializer: Initializer, module: StoredModule) -> bool:
    shape = module.shape if module.layout == "io" else module.shape[::-1]
    spec = InitSpec(initializer, initializer.rank_multiple, module.layout)
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
