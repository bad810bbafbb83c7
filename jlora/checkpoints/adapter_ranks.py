"""Ranks of the modules of an adapter, and a report of the energy that they keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlora import _checks
from jlora._processes import share_json
from jlora._types import Float
from jlora.adaptation.tables import format_table
from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.rules import choose_rank


class RankWish(NamedTuple):
    """How ranks are chosen: exactly one of the three is given."""

    rank: int | None
    energy: float | None
    budget: int | None


class ModuleReport(NamedTuple):
    """The part that the factors of one module keep of a change.

    Example:
        >>> import jlora
        >>> jlora.checkpoints.ModuleReport("q_proj", 64, 16, 0.98, 0.14).rank
        16
    """

    module: str
    old_rank: int  # before; of an extracted change the smaller of its sizes
    rank: int
    energy: float  # part of the squared norm that is kept
    error: float  # relative to the norm of the change, 0 if that is zero


class AdapterReport(NamedTuple):
    """The modules of a new adapter, and those left out; prints as a table.

    Example:
        >>> import jlora
        >>> row = jlora.checkpoints.ModuleReport("q_proj", 64, 16, 0.98, 0.14)
        >>> print(jlora.checkpoints.AdapterReport((row,), (("norm.weight", "is new"),)))
        module  rank before  rank  energy kept  relative error
        q_proj  64           16    0.9800       1.40e-01
        norm.weight: left out, it is new
    """

    modules: tuple[ModuleReport, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (name, reason)

    def __str__(self) -> str:
        head = ("module", "rank before", "rank", "energy kept", "relative error")
        rows = [
            (
                row.module,
                row.old_rank,
                row.rank,
                "-" if math.isnan(row.energy) else f"{row.energy:.4f}",
                "-" if math.isnan(row.error) else f"{row.error:.2e}",
            )
            for row in self.modules
        ]
        lines = format_table([head, *rows])
        lines += [f"{name}: left out, it {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def check_wish(rank: int | None, energy: float | None, budget: int | None) -> RankWish:
    """Return the checked wish, of which exactly one part is given."""
    given = sum(part is not None for part in (rank, energy, budget))
    if given != 1:
        raise ValueError(
            "`rank`, `energy` or `budget` must be given, exactly one of them, got "
            f"{given}. Choose one."
        )
    if rank is not None:
        rank = _checks.check_integer(rank, "rank")
    if budget is not None:
        budget = _checks.check_integer(budget, "budget")
    if energy is not None:
        advice = "Choose another."
        _checks.check_interval(energy, "energy", 0, 1, closed="right", advice=advice)
    return RankWish(rank, energy, budget)


def choose_ranks(
    wish: RankWish,
    spectra: Mapping[str, Float[np.ndarray, " k"]],
    shapes: Mapping[str, tuple[int, int]],
    rests: Mapping[str, float],
) -> dict[str, int]:
    """Return the rank of each module; 0 for a change of zero.

    Args:
        wish: how to choose.
        spectra: the leading singular values of each change.
        shapes: (inputs, outputs) of each.
        rests: Frobenius norm of the residual beyond these values.
    """
    ranks: dict[str, int] = {}
    for module, values in spectra.items():
        nonzero = int(np.count_nonzero(values))
        if nonzero == 0:
            ranks[module] = 0
        elif wish.rank is not None:
            ranks[module] = min(wish.rank, nonzero)
        elif wish.energy is not None:
            norm = math.hypot(float(np.linalg.norm(values)), rests[module])
            choice = choose_rank(
                values, "energy", energy=wish.energy, shape=shapes[module], norm=norm
            )
            ranks[module] = min(max(int(choice.rank), 1), nonzero)
    if wish.budget is None:
        return ranks

    bought = allocate_ranks(dict(spectra), budget=wish.budget, shapes=dict(shapes))
    assert isinstance(bought, dict)
    return {module: int(rank) for module, rank in bought.items()}


def plan_report(
    sizes: Mapping[str, tuple[int, int]],
    rank: int,
    skipped: Sequence[tuple[str, str]] = (),
) -> AdapterReport:
    """Return the report of a dry run: the largest ranks, and NaN for the rest.

    Args:
        sizes: {module: (its rank before, and the largest it can have)}.
        rank: the largest that the job gives.
        skipped: (name, reason) of tensors left out.
    """
    rows = [
        ModuleReport(module, old_rank, min(rank, limit), math.nan, math.nan)
        for module, (old_rank, limit) in sizes.items()
    ]
    return AdapterReport(tuple(rows), tuple(skipped))


def share_report(report: AdapterReport | None) -> AdapterReport:
    """Return the report of the first process on all of them."""
    modules, skipped = share_json(report)
    rows = tuple(ModuleReport(*row) for row in modules)
    return AdapterReport(rows, tuple((name, reason) for name, reason in skipped))


def report_module(
    module: str,
    values: Float[np.ndarray, " k"],
    rest: float,
    old_rank: int,
    rank: int,
) -> ModuleReport:
    """Return the report of a module truncated to a rank.

    Args:
        module: its path.
        values: the leading singular values of the change.
        rest: Frobenius norm of the residual.
        old_rank: before.
        rank: after.
    """
    left = math.hypot(float(np.linalg.norm(values[rank:])), rest)
    total = math.hypot(float(np.linalg.norm(values)), rest)
    error = left / total if total else 0.0
    return ModuleReport(module, old_rank, rank, 1 - error**2, error)
