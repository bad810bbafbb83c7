"""The weights of a checkpoint as modules: which tensors, in which layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.architectures import (
    EMBEDDINGS,
    NOT_TARGETS,
    Layouts,
    Slice,
    find_family,
    find_layout,
    find_module,
    find_tensors,
    is_one_expert,
)
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.float_weights import is_floating, is_fp8


class StoredModule(NamedTuple):
    """A weight that can have factors: one matrix, or one for each of its experts."""

    path: str  # of the module, or of the parameter of experts
    pieces: tuple[Slice, ...]  # the tensors that hold it
    shape: tuple[int, int]  # (inputs, outputs) of each matrix
    num_experts: int | None  # None: a single matrix
    layout: str  # of each matrix in the file: "io" or "oi"
    dtype: str  # NumPy's name

    @property
    def num_matrices(self) -> int:
        return 1 if self.num_experts is None else self.num_experts

    @property
    def num_elements(self) -> int:
        """Elements of one matrix."""
        return self.shape[0] * self.shape[1]


class MatrixRef(NamedTuple):
    """One matrix of a module."""

    module: StoredModule
    index: int  # of the expert; 0 for a single matrix

    @property
    def name(self) -> str:
        """Name of the matrix, the same in every run."""
        if self.module.num_experts is None:
            return self.module.path
        return f"{self.module.path}/{self.index}"


def list_modules(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    layouts: Layouts,
) -> tuple[list[StoredModule], dict[str, str]]:
    """Return the modules of a checkpoint, and {tensor: why it is none}.

    Args:
        checkpoint: see `open_checkpoint`.
        config: its config.json; empty if it has none.
        layouts: the user's own {regular expression: layout}.
    """
    reasons: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    scales = {*checkpoint.scales.values()}  # read with their weights
    for name in checkpoint:
        if name in scales:
            continue
        reason = _why_no_matrix(checkpoint, name)
        if reason is None:
            path = find_module(name, config.get("model_type"))
            groups.setdefault(path, []).append(name)
        else:
            reasons[name] = reason

    modules = []
    for path, names in groups.items():
        found = _make_module(checkpoint, config, layouts, path, names)
        if isinstance(found, str):
            reasons |= dict.fromkeys(names, found)
        else:
            modules.append(found)
    return modules, reasons


def list_matrices(modules: Iterable[StoredModule]) -> list[MatrixRef]:
    """Return every matrix of the modules, in order."""
    return [
        MatrixRef(module, i) for module in modules for i in range(module.num_matrices)
    ]


def is_target(module: StoredModule, targets: str | None) -> bool:
    """Return whether a module is to be adapted.

    Args:
        module: of a checkpoint.
        targets: regular expression, searched in its path and in the names of its
            tensors. None: no embeddings, heads and routers.
    """
    names = {module.path, *(piece.tensor for piece in module.pieces)}
    if targets is not None:
        return any(re.search(targets, name) for name in names)
    is_embedding = re.search(EMBEDDINGS, module.path) is not None
    return not is_embedding and not any(re.search(NOT_TARGETS, name) for name in names)


def read_matrix(checkpoint: Checkpoint, ref: MatrixRef) -> np.ndarray:
    """Return one matrix in the layout and the dtype of the file."""
    num_rows = ref.module.shape[1 if ref.module.layout == "oi" else 0]
    return read_rows(checkpoint, ref, 0, num_rows)


def read_rows(
    checkpoint: Checkpoint, ref: MatrixRef, start: int, stop: int
) -> np.ndarray:
    """Return rows of one matrix in the layout of the file.

    They have the dtype of the file; a weight in fp8 is dequantised to float32.
    """
    parts, offset = [], 0
    for piece in ref.module.pieces:
        if piece.expert not in (None, ref.index):
            continue
        *stack, num_rows, _ = checkpoint.info(piece.tensor).shape
        first, last = max(start - offset, 0), min(stop - offset, num_rows)
        offset += num_rows
        if first >= last:
            continue
        index = ref.index if stack else None
        parts.append(_read(checkpoint, piece.tensor, first, last, index))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read(
    checkpoint: Checkpoint, name: str, start: int, stop: int, index: int | None
) -> np.ndarray:
    """Return rows of a matrix, or of one of a stack."""
    if not is_fp8(checkpoint.info(name).dtype):
        return checkpoint.read_rows(name, start, stop, index=index)
    if index is None:
        return checkpoint.read_dequantized(name, start, stop)
    return checkpoint.read_dequantized(name, index, index + 1)[0, start:stop]


def _why_no_matrix(checkpoint: Checkpoint, name: str) -> str | None:
    """Return why a tensor has no factors, or None if it can have some."""
    shape, dtype = checkpoint.info(name)[:2]
    if not (is_floating(dtype) or is_fp8(dtype)):
        return f"has the dtype {dtype}"
    is_stack = len(shape) == 3 and _is_stacked(name)
    if (len(shape) != 2 and not is_stack) or 0 in shape:
        return f"has the shape {shape}, which is no matrix"
    return None


def _is_stacked(name: str) -> bool:
    """Return whether a tensor of three axes is a parameter of stacked experts."""
    return re.search(r"(^|\.)experts\.\w+$", name) is not None


def _make_module(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    layouts: Layouts,
    path: str,
    names: list[str],
) -> StoredModule | str:
    """Return the module of some tensors, or why they are none."""
    stored, dtype = checkpoint.info(names[0])[:2]
    model_type = config.get("model_type")
    if len(names) == 1 and not is_one_expert(names[0]):
        num_experts = stored[0] if len(stored) == 3 else None
        layout = find_layout(path, model_type, layouts)
        if layout is None and num_experts is not None:
            layout = "io" if find_family(model_type).has_experts_io else "oi"
        return _describe(
            path, (Slice(names[0]),), stored[-2:], num_experts, layout, dtype
        )

    # Experts in tensors of their own: all of them make up one stack.
    numbers = [int(text) for n in names for text in re.findall(r"experts\.(\d+)\.", n)]
    num_experts = max(numbers, default=0) + 1
    pieces = find_tensors(path, set(names), num_experts)
    is_known = pieces is not None and pieces[0].expert is not None
    if pieces is None or not is_known or len(pieces) != len(names):
        return "is one of many experts, which are not complete or not known as a stack"
    if len({checkpoint.info(name)[:2] for name in names}) != 1:
        return "is one of many experts, which differ in shape or dtype"
    num_parts = pieces[0].outputs[1]
    rows, columns = stored
    return _describe(
        path, tuple(pieces), (rows * num_parts, columns), num_experts, "oi", dtype
    )


def _describe(
    path: str,
    pieces: tuple[Slice, ...],
    stored: tuple[int, ...],
    num_experts: int | None,
    layout: str | None,
    dtype: str,
) -> StoredModule:
    rows, columns = stored
    layout = layout or "oi"
    shape = (rows, columns) if layout == "io" else (columns, rows)
    return StoredModule(path, pieces, shape, num_experts, layout, dtype)
