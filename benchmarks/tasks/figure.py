"""The picture of the tasks: the new domain against the old one, one panel each."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plots.style import OUR_COLORS, PEER_COLORS, PEER_MARKERS, make_panels
from benchmarks.tasks.results import compute_mean, compute_spread
from benchmarks.tasks.tables import list_tasks
from benchmarks.tasks.task import NEW, OLD

_COLORS = (*OUR_COLORS, *PEER_COLORS)


def draw_tasks(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Write the picture of all tasks; better is to the right and up in every panel.

    Args:
        results: of the tasks, from `read_newest`, on float bases.
        path: of the picture.
    """
    tasks = list_tasks(results)
    title = "Tasks: new domain against old domain, mean ± spread over seeds"
    figure, panels = make_panels(len(tasks), title, results)

    methods = list(dict.fromkeys(each["method"] for each in results))
    for axes, task in zip(panels, tasks, strict=True):
        members = [each for each in results if each["task"] == task]
        for result in members:
            _draw_result(axes, result, methods.index(result["method"]))
        axes.set_title(task, fontsize=10)

    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def _draw_result(axes: Any, result: Mapping[str, Any], number: int) -> None:
    metrics = [
        next(each for each in result["metrics"] if each["domain"] == domain)
        for domain in (NEW, OLD)
    ]
    (x, y), (width, height) = (
        [measure(metric) for metric in metrics]
        for measure in (compute_mean, compute_spread)
    )
    axes.errorbar(
        x,
        y,
        height,
        width,
        color=_COLORS[number % len(_COLORS)],
        marker=PEER_MARKERS[number % len(PEER_MARKERS)],
        markersize=6,
        elinewidth=0.8,
        linestyle="",
        label=result["method"],
    )

    # Both directions so that better is to the right and up.
    for axis, metric in zip((axes.xaxis, axes.yaxis), metrics, strict=True):
        axis.set_label_text(metric["name"])
        axis.set_inverted(not metric["is_better_higher"])
