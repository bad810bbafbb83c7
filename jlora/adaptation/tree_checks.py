"""Checks of a tree when its plan is made: paths, tied arrays, layouts."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

_DEFAULT = "io"
# The layouts that models use, by the number of axes.
_LAYOUTS = {
    3: {"ioo": "heads of outputs", "iio": "a convolution, or heads of inputs"},
    4: {"iiio": "a convolution", "iioo": "two axes each", "bioo": "stacked heads"},
}
_WINDOWS = (1, 3, 5, 7, 9, 11)  # edges of square kernels of convolutions
_LONG_STACK = 16


def check_layout_given(
    path: str, shape: tuple[int, ...], layout: str, num_parameters: int
) -> None:
    """Refuse the default layout for an array that is hardly a stack of matrices.

    The default takes all axes before the last two for a stack. For the kernel of an
    attention layer, [inputs, heads, size], that gives factors larger than the weight;
    for the kernel of a convolution, [height, width, inputs, outputs], one small adapter
    for each place of the window, which no rule of `lift` can apply.
    """
    if layout != _DEFAULT or len(shape) <= 2:
        return
    size = math.prod(shape)
    window = shape[:-2]
    num_matrices = math.prod(window)
    is_window = len(window) > 1 and len({*window}) == 1 and window[0] in _WINDOWS
    is_long = num_matrices >= max(_LONG_STACK, *shape[-2:])
    if not is_window and not (is_long and num_parameters >= size):
        return

    reason = f"takes it for {num_matrices} matrices of {shape[-2]}×{shape[-1]}"
    if not is_window:
        reason += f", with {num_parameters} numbers in factors of {size}"
    fitting = [f"{key!r} ({use})" for key, use in _LAYOUTS.get(len(shape), {}).items()]
    stack = "b" * len(window) + _DEFAULT
    listed = ", ".join([*fitting, f"{stack!r} (a stack)"])
    raise ValueError(
        f"{path}: `layout` must be given for the shape {shape}, got the default, which "
        f"{reason}. Choose among {listed}, or others of this length."
    )


def check_paths(leaves: list[tuple[str, Any]]) -> None:
    """Refuse a path that names two leaves."""
    seen: set[str] = set()
    for path, _ in leaves:
        if path in seen:
            raise ValueError(
                f"{path}: `params` must give each leaf a path of its own, got two "
                "leaves with this one. Rename a key: a path joins the keys with '/'."
            )
        seen.add(path)


def find_tied(
    leaves: list[tuple[str, Any]], planned: set[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the paths of each array that occurs twice and is adapted."""
    paths: dict[int, list[str]] = {}
    for path, leaf in leaves:
        if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim > 1:
            paths.setdefault(id(leaf), []).append(path)
    groups = (group for group in paths.values() if len(group) > 1)
    return tuple(tuple(group) for group in groups if planned & {*group})
