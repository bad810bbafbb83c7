"""Evaluations during a run: the best factors, and when to stop early."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Tree

# A number, or {name: number}, of which the first one decides; lower is better.
Evaluate: TypeAlias = Callable[[Tree], Any]
Callback: TypeAlias = Callable[[int, dict[str, float]], Any]


class StepEvaluation(NamedTuple):
    """The result of `evaluate` at one step.

    Example:
        >>> import jlora
        >>> jlora.training.StepEvaluation(100, {"loss": 0.5}).step
        100
    """

    step: int  # updates made
    values: dict[str, float]


class Monitor:
    """Evaluates a run now and then, and keeps the best trained arrays.

    Args:
        evaluate: function of the adapted tree; None: never.
        every: steps between two evaluations.
        patience: evaluations without a better value before the run ends; None: no end.
    """

    def __init__(
        self, evaluate: Evaluate | None, every: int, patience: int | None
    ) -> None:
        self._evaluate = evaluate
        self.every = None if evaluate is None else every
        self._patience = patience
        self.evaluations: list[StepEvaluation] = []
        self.best: Tree | None = None  # trained arrays, at `best_step`

    @property
    def best_step(self) -> int | None:
        """The step of the lowest value; None: no evaluation yet."""
        if not self.evaluations:
            return None
        return min(self.evaluations, key=_get_score).step

    @property
    def stop_reason(self) -> str | None:
        """Why the run should end now; None: it should not."""
        if self._patience is None or not self.evaluations:
            return None
        steps = [each.step for each in self.evaluations]
        num_worse = len(steps) - 1 - steps.index(self.best_step or 0)
        if num_worse < self._patience:
            return None
        return (
            f"no better evaluation than the one of step {self.best_step} in "
            f"{num_worse} more"
        )

    def see(self, step: int, trainable: Tree, adapted: Tree) -> StepEvaluation | None:
        """Evaluate, and return the result; None if this step has been seen."""
        has_seen = self.evaluations and self.evaluations[-1].step >= step
        if self._evaluate is None or has_seen:
            return None
        found = StepEvaluation(step, _read_values(self._evaluate(adapted)))
        self.evaluations.append(found)
        if self.best_step == step:
            # The arrays are donated to the next step.
            self.best = jax.tree.map(jnp.copy, trainable)
        return found


class MetricsFile:
    """Lines of JSON with the numbers of a run, appended while it goes on.

    Args:
        path: of the file; None: nothing is written.
        step: a resumed run has made so many steps: later lines of the file are dropped.
    """

    def __init__(self, path: str | os.PathLike[str] | None, step: int) -> None:
        self._path = None if path is None else pathlib.Path(path)
        if self._path is not None:
            kept = _read_lines(self._path, step) if step else []
            self._path.write_text("".join(kept))

    def add(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Append a line for each (step, values)."""
        if self._path is None:
            return
        with open(self._path, "a") as file:
            for step, values in rows:
                plain = {name: _to_number(value) for name, value in values.items()}
                file.write(json.dumps({"step": step, **plain}) + "\n")


def _get_score(evaluation: StepEvaluation) -> float:
    """Return the value that decides; NaN counts as the worst."""
    score = next(iter(evaluation.values.values()))
    return math.inf if math.isnan(score) else score


def _read_values(found: Any) -> dict[str, float]:
    named = dict(found) if isinstance(found, Mapping) else {"evaluation": found}
    values = {}
    for name, value in named.items():
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "fiub":
            raise TypeError(
                "`evaluate` must return a number or {name: number}, got "
                f"{array.dtype} of shape {array.shape} at {name!r}. Reduce it first."
            )
        values[str(name)] = float(array.reshape(()))
    if not values:
        raise ValueError("`evaluate` must return a number, got none. Name one.")
    return values


def _read_lines(path: pathlib.Path, step: int) -> list[str]:
    """Return the whole lines of the file up to a step."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            is_old = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            continue  # half a line of a killed run
        if is_old:
            kept.append(line)
    return kept


def _to_number(value: Any) -> Any:
    """Return a value as JSON has it; NaN and Inf become text."""
    array = np.asarray(value)
    if array.size != 1:
        return array.tolist()
    number = array.item()
    is_plain = not isinstance(number, float) or math.isfinite(number)
    return number if is_plain else str(number)
