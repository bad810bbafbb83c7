"""What the first factors of a model hold, and whether its base has moved."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from jlora.checkpoints.adapter_ranks import AdapterReport, ModuleReport
from jlora.checkpoints.architectures import find_module
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.factors import Factors


def report_adapted(
    source: Checkpoint, base: pathlib.Path, factors: Mapping[str, Factors]
) -> tuple[AdapterReport, bool]:
    """Return the report of a new adapter, and whether any weight of the base moved.

    Args:
        source: the checkpoint that was read.
        base: the folder with the new base.
        factors: by module.
    """
    rows, has_moved = [], False
    files = {path.name: open_checkpoint(path) for path in base.glob("*.safetensors")}
    moved = {name: checkpoint for checkpoint in files.values() for name in checkpoint}
    for name in source:
        module = find_module(name)
        if module not in factors:
            continue
        old, new = source[name], moved[name][name]
        has_moved = has_moved or old.tobytes() != new.tobytes()
        wide = old.astype(np.float64)
        total = float(np.linalg.norm(wide)) or 1.0
        error = float(np.linalg.norm(new.astype(np.float64))) / total
        rank = factors[module].u.shape[-1]
        rows.append(
            ModuleReport(module, min(old.shape), rank, max(1 - error**2, 0.0), error)
        )
    return AdapterReport(tuple(rows)), has_moved
