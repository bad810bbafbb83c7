"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jlora.adaptation.mesh_plans import format_ways
from jlora.adaptation.tables import format_table
from jlora.layouts import complete_layout

if TYPE_CHECKING:
    from jlora.adaptation.plan import Plan, PlanEntry

_BYTES = ("base", "bytes before", "bytes after")


def format_plan(plan: Plan) -> list[str]:
    """Return the lines that `print(plan)` shows."""
    is_quantized = any(entry.rule.format is not None for entry in plan.entries)
    head = ("path", "shape", "rank", "parameters", "init", "trainable")
    rows: list[tuple[str, ...]] = [(*head, *(_BYTES if is_quantized else ()))]
    for entry in plan.entries:
        cells = _list_cells(entry)
        rows.append((*cells, *(_list_bytes(entry) if is_quantized else ())))
    lines = format_table(rows)
    if is_quantized:
        before = sum(entry.num_bytes for entry in plan.entries)
        after = sum(entry.num_base_bytes for entry in plan.entries)
        lines.append(f"bytes of the weights: {before} before, {after} after")
    lines += [f"{path}: not adapted, it {reason}" for path, reason in plan.skipped]
    lines += [
        f"{', '.join(paths)}: one array now, different weights after adapting"
        for paths in plan.tied
    ]
    if plan.mesh is not None and plan.rates is not None:
        lines += format_ways(plan.list_ways(), plan.mesh, plan.rates)
    return lines


def _list_cells(entry: PlanEntry) -> tuple[str, ...]:
    """Return the cells of an entry's row in the printed plan."""
    rule = entry.rule
    trainable = rule.trainable or ""
    if rule.num_columns is not None:
        trainable = f"v, last {rule.num_columns} columns"

    numbers = (str(entry.rank), str(entry.num_parameters))
    return (
        entry.path,
        _describe_shape(entry),
        *numbers,
        rule.initializer.label,
        trainable,
    )


def _list_bytes(entry: PlanEntry) -> tuple[str, ...]:
    """Return the cells of the format and of the bytes before and after adapting."""
    format = entry.rule.format
    label = "plain" if format is None else format.label
    return label, str(entry.num_bytes), str(entry.num_base_bytes)


def _describe_shape(entry: PlanEntry) -> str:
    """Return the shape, and the shape as a matrix where the layout changes it."""
    shape = "×".join(map(str, entry.shape))
    if complete_layout(entry.rule.layout, len(entry.shape)).lstrip("b") == "io":
        return shape
    m, n = entry.matrix_shape[-2:]
    return f"{shape} as {m}×{n}"
