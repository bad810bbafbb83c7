"""Factors of qwix, with the axes of an Einsum, as matrices."""

from __future__ import annotations

import pathlib

import numpy as np

from jlora.checkpoints.peft_file import make_pair
from jlora.factors import Factors


def merge_axes(
    path: pathlib.Path, name: str, a: np.ndarray, b: np.ndarray, scale: float
) -> Factors:
    """Return u [*stack, in, r] and v [*stack, r, out].

    qwix stores a [*stack, *in, r] and b [*stack, r, *out]. A scanned model has the
    layers as a stack.

    Args:
        path: of the file, named in errors.
        name: of the weight, named in errors.
        a: the first factor.
        b: the second factor.
        scale: alpha / rank.

    Raises:
        ValueError: shapes that do not fit, or that fit in several ways.
    """
    fitting = [
        num_stacked
        for num_stacked in range(min(a.ndim, b.ndim) - 1)
        if a.shape[:num_stacked] == b.shape[:num_stacked]
        and a.shape[-1] == b.shape[num_stacked]
    ]
    if len(fitting) != 1:
        raise ValueError(_refuse_shapes(path, name, a, b, bool(fitting)))

    num_inputs = a.ndim - fitting[0] - 1
    num_outputs = b.ndim - fitting[0] - 1
    if num_inputs > 1 and num_outputs > 1:
        # Several axes on both sides, or layers that are stacked along another axis.
        raise ValueError(_refuse_shapes(path, name, a, b, True))
    if num_inputs > 2 and max(a.shape[fitting[0] : -2]) > 1:
        raise ValueError(
            f"{path}: must hold factors of matrices, got factors of a convolution, "
            f"{a.shape} and {b.shape}, at {name}. Leave the layer out."
        )

    stack, rank = a.shape[: fitting[0]], a.shape[-1]
    u, v = a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1)
    return make_pair(u, v, scale=scale)


def _refuse_shapes(
    path: pathlib.Path, name: str, a: np.ndarray, b: np.ndarray, fits: bool
) -> str:
    if fits:
        reason = "that can be read in one way"
        advice = "Save the layers one by one, each with two axes"
    else:
        reason = "of one rank"
        advice = "Save the adapter again"
    return (
        f"{path}: must hold factors {reason}, got a {a.shape} and b {b.shape} at "
        f"{name}. {advice}."
    )
