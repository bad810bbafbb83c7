"""The list of all plots, and the PNG files that they are written to."""

import functools
import pathlib

from benchmarks.plots.memory import draw_memory
from benchmarks.plots.pareto import draw_frontier
from benchmarks.plots.roofline import draw_roofline
from benchmarks.plots.scaling import draw_times
from benchmarks.report.statistics import is_measured

# Name of the file: (title, function of records and title → figure or None).
_PLOTS = {
    "frontier": ("Truncated SVD: time against excess error", draw_frontier),
    **{
        f"time-against-{varied}": (
            f"Time against {varied}",
            functools.partial(draw_times, varied=varied),
        )
        for varied in ("size", "rank", "batch", "tokens")
    },
    "roofline": ("Roofline: rates against the measured limits", draw_roofline),
    "memory": ("Peak memory of compiled JAX programs", draw_memory),
}


def draw_plots(records: list[dict], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Write every plot that the records hold data for, and return {title: path}."""
    measured = [record for record in records if is_measured(record)]

    paths = {}
    for name, (title, draw) in _PLOTS.items():
        figure = draw(measured, title)
        if figure is not None:
            paths[title] = folder / f"{name}.png"
            figure.savefig(paths[title], dpi=110, bbox_inches="tight")
    return paths
