"""Axes to draw on; matplotlib is optional."""

from __future__ import annotations

import os
from typing import Any


def make_figure(num_panels: int) -> tuple[Any, list[Any]]:
    """Return a new figure, and its panels side by side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Imported in the call: matplotlib is an extra. pyplot would open windows.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "`plot` must have matplotlib to draw with, got an environment without it. "
            "Install jlora[plot]."
        ) from None
    figure = Figure(figsize=(6 * num_panels, 4), layout="constrained")
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def save_figure(axes: Any, path: str | os.PathLike[str] | None) -> None:
    """Write the figure of some axes to a file, if there is a path."""
    if path is not None:
        axes.get_figure().savefig(path, dpi=150)
