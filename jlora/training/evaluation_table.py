"""The result of `evaluate`: data, a printed table, a plot."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from jlora._types import Float
from jlora.adaptation.tables import format_table
from jlora.training.evaluation import TrainingCost
from jlora.training.figures import make_figure, save_figure
from jlora.training.step_cost import StepCost


class Evaluation(NamedTuple):
    """Metrics of several models in several domains, and costs, from `evaluate`.

    Example:
        >>> import numpy as np, jlora
        >>> values = np.array([[[0.9], [0.4]], [[0.8], [0.7]]])
        >>> result = jlora.training.Evaluation(
        ...     ("before", "after"), ("general", "technical"), ("accuracy",), values,
        ...     {}, "before", "general")
        >>> result.forgetting.round(3).tolist()
        [[0.0], [-0.1]]
        >>> float(result.get("after", "technical", "accuracy"))
        0.7
    """

    labels: tuple[str, ...]
    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Float[np.ndarray, "labels domains metrics"]  # float64
    costs: dict[str, TrainingCost | StepCost]  # {label: cost}, of some labels
    before: str  # label of the model before the training
    old: str  # domain in which forgetting is measured

    @property
    def forgetting(self) -> Float[np.ndarray, "labels metrics"]:
        """Each metric in the old domain, minus its value before the training."""
        values = self.values[:, self.domains.index(self.old)]
        return values - values[self.labels.index(self.before)]

    def get(self, label: str, domain: str, metric: str) -> float:
        """Return one value by its names."""
        domain_index = self.domains.index(domain)
        metric_index = self.metrics.index(metric)
        return float(self.values[self.labels.index(label), domain_index, metric_index])

    def __str__(self) -> str:
        metrics = self.metrics
        head = [
            "",
            *(f"{domain} {name}" for domain in self.domains for name in metrics),
        ]
        columns = [*self.values.reshape(len(self.labels), -1).T]
        if len(self.labels) > 1:
            head += [f"forgetting {name}" for name in metrics]
            columns += [*self.forgetting.T]

        cells = [[f"{value:.4g}" for value in column] for column in columns]
        rows = [head, *zip(self.labels, *cells, strict=True)]
        costs = [_list_cost_cells(self.costs.get(label)) for label in self.labels]
        costs = [["trained", "optimizer", "step", "peak memory"], *costs]
        known = [i for i in range(4) if any(row[i] for row in costs[1:])]
        rows = [
            [*row, *(cost[i] for i in known)]
            for row, cost in zip(rows, costs, strict=True)
        ]
        return "\n".join(format_table(rows))

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.labels)} labels, {len(self.domains)} domains, "
            f"{len(self.metrics)} metrics)"
        )

    def plot(self, *, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw a panel of bars for each metric, grouped by domain.

        Args:
            path: also save the figure in this file. None: do not.

        Returns:
            The figure of matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, panels = make_figure(len(self.metrics))
        at = np.arange(len(self.domains))
        width = 0.8 / len(self.labels)

        for k, axes in enumerate(panels):
            for i, label in enumerate(self.labels):
                left = at + (i - (len(self.labels) - 1) / 2) * width
                axes.bar(left, self.values[i, :, k], width, label=label)
            axes.set_xticks(at, self.domains)
            axes.set_ylabel(self.metrics[k])
        panels[0].legend(fontsize="small")
        save_figure(panels[0], path)
        return figure


def _list_cost_cells(cost: TrainingCost | StepCost | None) -> list[str]:
    """Return the cells trained, optimizer, step, peak memory; "" if unknown."""
    if cost is None:
        return [""] * 4
    step_ms = getattr(cost, "step_ms", None)
    peak_bytes = getattr(cost, "peak_bytes", None)
    return [
        f"{cost.num_trained:,}",
        _format_bytes(cost.optimizer_bytes),
        "" if step_ms is None else f"{step_ms:.3g} ms",
        "" if peak_bytes is None else _format_bytes(peak_bytes),
    ]


def _format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
