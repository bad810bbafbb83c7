"""`FitResult`: the trained tree, and the numbers of the run."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from jlora._types import Float, Tree
from jlora.training.monitor import StepEvaluation


class FitResult(NamedTuple):
    """The result of `fit`.

    Example:
        >>> import jlora
        >>> jlora.training.FitResult._fields[:4]
        ('adapted', 'losses', 'opt_state', 'stop_reason')
    """

    adapted: Tree  # with the trained factors
    losses: Float[np.ndarray, " steps"]  # float64, the loss before each update
    opt_state: Any  # optax state after the last update
    stop_reason: str | None  # None: all batches done; else why it ended early
    metrics: Any = None  # of the loss with has_aux: arrays with an axis of steps first
    evaluations: tuple[StepEvaluation, ...] = ()
    best: Tree | None = None  # with the factors of the lowest evaluation

    def __repr__(self) -> str:
        first, last = (f"{value:.4g}" for value in self.losses[[0, -1]])
        return (
            f"FitResult({len(self.losses)} losses from {first} to {last}, "
            f"stop_reason={self.stop_reason!r})"
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the losses and the evaluations over the steps, with matplotlib.

        Args:
            path: of the picture; its suffix decides the format.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib, got an environment without it. Install "
                "jlora[plot]."
            ) from error
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(np.arange(1, len(self.losses) + 1), self.losses, label="loss", lw=1)
        names = self.evaluations[0].values if self.evaluations else ()
        for name in names:
            points = [(each.step, each.values[name]) for each in self.evaluations]
            axes.plot(*zip(*points, strict=True), "o-", label=name, ms=3)
        axes.set_xlabel("step")
        axes.legend()
        figure.savefig(path)
