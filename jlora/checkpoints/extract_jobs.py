"""`extract_checkpoint`: the difference of two checkpoints as an adapter."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from jlora import _checks
from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.checkpoints.adapter_files import write_job_adapter
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    check_wish,
    plan_report,
)
from jlora.checkpoints.architectures import Layouts, check_layouts
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.differences import (
    Operands,
    check_window_memory,
    fill_store,
)
from jlora.checkpoints.factor_store import (
    choose_module_ranks,
    make_factor_reader,
    plan_stored_adapter,
    read_spectra,
)
from jlora.checkpoints.float_weights import is_floating, is_fp8
from jlora.checkpoints.folders import read_model_config
from jlora.checkpoints.memory import check_max_memory
from jlora.checkpoints.modules import (
    StoredModule,
    is_target,
    list_matrices,
    list_modules,
)
from jlora.checkpoints.output_folder import OutputFolder, check_target, identify
from jlora.checkpoints.saved_parameters import can_be_saved, plan_saved
from jlora.checkpoints.shared_jobs import choose_part, choose_report, run_shared
from jlora.checkpoints.shared_output import JobFolder
from jlora.checkpoints.window_store import WORK, WindowStore, list_window_files

Path = str | os.PathLike[str]

_BLOCK = 2**22  # elements that are compared at once


def extract_checkpoint(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int = 256,
    targets: str = ".*",
    modules_to_save: str | None = None,
    layouts: Layouts | None = None,
    portable: bool = True,
    key: PRNGKey,
    max_memory: int | None = None,
    process: tuple[int, int] | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> AdapterReport:
    """Write the difference of two checkpoints as a PEFT adapter, and return a report.

    Each matrix of the difference is subtracted in float32 and truncated to its leading
    singular triplets. Blocks of the checkpoints and one difference are in memory at a
    time. Weights in fp8 are dequantised with their scales, see
    `Checkpoint.read_dequantized`. The folder appears when it is whole; a run that was
    interrupted goes on where it was.

    Args:
        base: checkpoint before fine-tuning, see `open_checkpoint`.
        tuned: checkpoint after it.
        output: folder to write; it must not exist.
        rank: of every module. None: not by rank.
        energy: part of the squared norm to keep of each change. None: not by energy.
        budget: numbers in all the factors. None: not by budget.
        max_rank: static, largest rank that `energy` and `budget` may give.
        targets: regular expression, searched in the names of the matrices.
        modules_to_save: regular expression, searched in the names of tensors
            that get no factors: those that changed are stored whole. None: nothing is.
        layouts: {regular expression on a module or tensor: "io" or "oi"} for models
            that jlora does not know; the first one that matches decides. None: the
            table of jlora, and "oi", PyTorch's [outputs, inputs], for all others.
        portable: as in `save_peft`.
        key: one typed PRNG key, consumed; folded with each name.
        max_memory: bytes of the process, with about 200 MiB for JAX itself. None: no
            limit.
        process: (index, count), the part of the work for this process; all of them
            must see one file system. Each writes its matrices and ends, and the last
            one completes the folder, with the same bytes as one process. Rerun the
            one that died. None: everything, or the part of this process of
            `jax.distributed`, where all return when the folder is there.
        dry_run: only check, and return the largest ranks that there may be, with NaN
            for unknown numbers.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.

    Returns:
        `AdapterReport`, without modules if other processes have work left. Differences
        that are not in the adapter are listed in `skipped`: tensors of one side only,
        of another shape, vectors.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank, energy and budget, damaged files, NaN or
            Inf, a weight in fp8 without its scale, nothing that differs, a matrix that
            does not fit in `max_memory`, an output that exists or has no room.

    Cost: one `randomized_svd` of each matrix.

    Accuracy: as `randomized_svd` with ten passes. Its factors miss up to 2 % of the
        energy of the best ones where the singular values hardly fall, and less the
        faster they fall. The energies in the report are relative to the whole change.

    Example:
        >>> import jax, numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> old, new = (f"{folder.name}/{name}.safetensors" for name in ("old", "new"))
        >>> jlora.save_arrays(old, {"layers.0.q_proj.weight": np.eye(4)})
        >>> jlora.save_arrays(new, {"layers.0.q_proj.weight": np.eye(4) + 1})
        >>> report = jlora.checkpoints.extract_checkpoint(
        ...     old, new, f"{folder.name}/adapter", rank=1, key=jax.random.key(0),
        ...     progress=False)
        >>> round(report.modules[0].energy, 4)
        1.0
        >>> folder.cleanup()
    """
    wish = check_wish(rank, energy, budget)
    _checks.check_key(key)
    max_rank = wish.rank or _checks.check_integer(max_rank, "max_rank")
    max_memory = check_max_memory(max_memory)
    layouts = check_layouts(layouts)
    part = choose_part(process)

    # Find out everything before the first byte is written.
    old, new = open_checkpoint(base), open_checkpoint(tuned)
    config = read_model_config(new.path) or read_model_config(old.path)
    inputs = [old.path, new.path]
    check_target(pathlib.Path(output).absolute(), inputs)
    modules, rests = _compare(old, new, config, layouts, targets)
    saved, skipped = _list_others(old, new, rests, modules_to_save)
    check_window_memory(modules, max_rank, max_memory)
    if dry_run:
        limits = {module.path: min(module.shape) for module in modules}
        sizes = {path: (limit, limit) for path, limit in limits.items()}
        return plan_report(sizes, max_rank, skipped)

    job = {
        "job": "extract",
        "inputs": [identify(path) for path in (*old.files, *new.files)],
        "wish": [*wish, max_rank],
        "patterns": [targets, modules_to_save, layouts],
        "portable": portable,
        "key": jax.random.key_data(key).tolist(),
    }
    refs = list_matrices(modules)
    num_bytes = sum(4 * max_rank * sum(ref.module.shape) for ref in refs)
    num_bytes = 2 * num_bytes + sum(2 * new.info(name).num_bytes for name in saved)

    def decompose(folder: OutputFolder) -> WindowStore:
        store = WindowStore(folder, refs, max_rank, "svd")
        with Progress("extract", len(refs), enabled=progress, unit="matrices") as bar:
            fill_store(store, Operands(new, old), max_rank, key, max_memory, bar)
        return store

    def write_all(folder: OutputFolder) -> AdapterReport:
        store = decompose(folder)
        spectra = read_spectra(store, modules)
        ranks, report = choose_module_ranks(spectra, modules, wish, {})
        if not ranks:
            _refuse_no_factors(old, new, bool(report.skipped))

        layout = plan_stored_adapter(modules, ranks, portable=portable)
        read_factors = make_factor_reader(store, modules, ranks)
        whole = plan_saved(saved, layout.shapes, new)
        write_job_adapter(
            folder, layout, read_factors, saved=whole.tensors, config=whole.config
        )
        folder.drop(WORK)
        return report

    place = JobFolder(output, inputs, num_bytes, job)
    first = list_window_files(refs, max_rank, "svd")
    report = run_shared(place, part, first, decompose, write_all)
    report = choose_report(report, part)
    return report._replace(skipped=(*report.skipped, *skipped))


def _refuse_no_factors(old: Checkpoint, new: Checkpoint, has_change: bool) -> NoReturn:
    if has_change:
        raise ValueError(
            f"{new.path}: must differ in a matrix of a rank above 0, got none. "
            "Raise the budget."
        )
    raise ValueError(
        f"{new.path}: must differ from {old.path} in a matrix that `targets` "
        "matches, got no difference. Check the two paths."
    )


def _compare(
    old: Checkpoint,
    new: Checkpoint,
    config: Mapping[str, Any],
    layouts: Layouts,
    targets: str,
) -> tuple[list[StoredModule], dict[str, str]]:
    """Return the modules of both that are targets, and {tensor: why it is in none}."""
    modules, reasons = list_modules(new, config, layouts)
    found = []
    for module in modules:
        names = [piece.tensor for piece in module.pieces]
        reason = next(filter(None, (_why_not(old, new, name) for name in names)), None)
        if reason is None and not is_target(module, targets):
            reason = "is no target"
        if reason is None:
            found.append(module)
        else:
            reasons |= dict.fromkeys(names, reason)
    absent = {name: _why_not(old, new, name) for name in reasons}
    return found, reasons | {name: why for name, why in absent.items() if why}


def _why_not(old: Checkpoint, new: Checkpoint, name: str) -> str | None:
    """Return why two tensors cannot be subtracted, or None if they can."""
    if name not in old:
        return "is in the tuned checkpoint only"
    one, other = old.info(name), new.info(name)
    if one.shape != other.shape:
        return f"has the shape {one.shape} in the base and {other.shape} after it"
    dtypes = (one.dtype, other.dtype)
    if one.dtype != other.dtype and not all(
        is_floating(d) or is_fp8(d) for d in dtypes
    ):
        return f"has the dtypes {one.dtype} and {other.dtype}"
    return None


def _list_others(
    old: Checkpoint,
    new: Checkpoint,
    reasons: Mapping[str, str],
    modules_to_save: str | None,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return tensors to store whole, and (name, reason) of tensors left out.

    Only tensors that differ are in either of them.
    """
    saved = []
    scales = {*old.scales.values(), *new.scales.values()}  # read with their weights
    gone = [name for name in old if name not in new and name not in scales]
    skipped = [(name, "is in the base only") for name in gone]
    for name, reason in reasons.items():
        if name in scales or not _differs(old, new, name):
            continue
        if modules_to_save is None or not re.search(modules_to_save, name):
            skipped.append((name, reason))
        elif not can_be_saved(name, new):
            skipped.append((name, "lies in a module with others inside"))
        else:
            saved.append(name)
    return saved, skipped


def _differs(old: Checkpoint, new: Checkpoint, name: str) -> bool:
    """Return whether a tensor or its scale has other bytes."""
    if name not in old or old.info(name)[:2] != new.info(name)[:2]:
        return True
    shape = old.info(name).shape
    num_rows = shape[0] if shape else 1
    step = max(1, _BLOCK // max(math.prod(shape[1:]), 1))
    for start in range(0, num_rows, step):
        rows = (each.read_rows(name, start, start + step) for each in (old, new))
        if len({array.tobytes() for array in rows}) > 1:
            return True
    scale = new.scales.get(name)
    return scale is not None and _differs(old, new, scale)
