"""The errors of a cross-validation over ranks and rates, and the rank they choose."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from jlora._types import Float
from jlora.adaptation.tables import format_table
from jlora.training.figures import make_figure, save_figure


class RankTrials(NamedTuple):
    """The held-out errors of `cross_validate`, and the rank and rate they choose.

    `print` shows one row for each rank at its best rate.

    Example:
        >>> import numpy as np, jlora
        >>> errors = np.array([[[3.0, 3.2]], [[1.0, 1.4]], [[0.9, 1.3]]])
        >>> trials = jlora.training.RankTrials((1, 2, 4), (0.1,), errors)
        >>> trials.rank, trials.best_rank
        (2, 4)
        >>> print(trials)
        rank  rate  error  standard error
        1     0.1   3.1    0.1
        2     0.1   1.2    0.2             chosen
        4     0.1   1.1    0.2             smallest error
    """

    ranks: tuple[int, ...]
    rates: tuple[float, ...]
    errors: Float[np.ndarray, "ranks rates folds"]  # float64; inf: it diverged

    @property
    def means(self) -> Float[np.ndarray, " ranks"]:
        """Mean error over the folds of each rank, at its best rate."""
        return self.errors.mean(axis=-1).min(axis=-1)

    @property
    def standard_errors(self) -> Float[np.ndarray, " ranks"]:
        """Standard error of each of `means` over the folds; inf where the mean is."""
        best = self._best_rate_indices
        own = self.errors[np.arange(len(self.ranks)), best]
        is_finite = np.all(np.isfinite(own), axis=-1)

        own = np.where(np.isfinite(own), own, 0.0)  # no warnings of inf - inf
        spread = own.std(axis=-1, ddof=1)
        return np.where(is_finite, spread / np.sqrt(own.shape[-1]), np.inf)

    @property
    def best_rates(self) -> tuple[float, ...]:
        """The rate with the smallest mean error, of each rank."""
        return tuple(self.rates[i] for i in self._best_rate_indices)

    @property
    def best_rank(self) -> int:
        """The rank with the smallest mean error."""
        return self.ranks[int(np.argmin(self.means))]

    @property
    def rank(self) -> int:
        """The smallest rank within one standard error of the smallest mean error."""
        best = int(np.argmin(self.means))
        limit = self.means[best] + self.standard_errors[best]
        pairs = zip(self.ranks, self.means, strict=True)
        return min(rank for rank, mean in pairs if mean <= limit)

    @property
    def rate(self) -> float:
        """The best rate of the chosen rank."""
        return self.best_rates[self.ranks.index(self.rank)]

    @property
    def _best_rate_indices(self) -> np.ndarray:
        return np.argmin(self.errors.mean(axis=-1), axis=-1)

    def __repr__(self) -> str:
        num_ranks, num_rates, num_folds = self.errors.shape
        return (
            f"RankTrials(rank={self.rank}, rate={self.rate:g}, of {num_ranks} ranks, "
            f"{num_rates} rates, {num_folds} folds)"
        )

    def __str__(self) -> str:
        rows = [["rank", "rate", "error", "standard error", ""]]
        columns = (self.ranks, self.best_rates, self.means, self.standard_errors)
        for rank, rate, mean, error in zip(*columns, strict=True):
            names = {"smallest error": self.best_rank, "chosen": self.rank}
            notes = ", ".join(name for name, own in names.items() if own == rank)
            numbers = [f"{number:.4g}" for number in (rate, mean, error)]
            rows.append([str(rank), *numbers, notes])
        return "\n".join(format_table(rows))

    def plot(
        self, ax: Any = None, *, path: str | os.PathLike[str] | None = None
    ) -> Any:
        """Draw mean and standard error over the ranks, and mark the chosen rank.

        Args:
            ax: axes of matplotlib to draw on. None: those of a new figure.
            path: also save the figure in this file. None: do not.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            _, (ax,) = make_figure(1)
        is_finite = np.isfinite(self.means)
        order = np.argsort(self.ranks)
        order = order[is_finite[order]]

        ranks = np.asarray(self.ranks)[order]
        means, errors = self.means[order], self.standard_errors[order]
        ax.errorbar(ranks, means, errors, marker="o", capsize=3, label="held-out error")
        best = self.ranks.index(self.best_rank)
        limit = self.means[best] + self.standard_errors[best]
        label = "smallest error + standard error"
        ax.axhline(limit, color="gray", linewidth=0.8, linestyle=":", label=label)
        ax.axvline(self.rank, color="gray", linewidth=0.8, label=f"rank {self.rank}")

        ax.set_xscale("log", base=2)
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        ax.set(xlabel="rank", ylabel="error on held-out examples")
        ax.legend(fontsize="small")
        save_figure(ax, path)
        return ax
