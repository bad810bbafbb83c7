"""Layouts: which axes of a weight are inputs and outputs, and its view as matrices.

A layout names each axis of an array in storage order: "b" batch, "i" input, "o" output.
Axes before the named ones are batch axes, so "oi" also describes a stack of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from jlora._types import Float

ArrayT = TypeVar(
    "ArrayT", jax.Array, np.ndarray
)  # a function returns the kind it is given


def complete_layout(layout: str, ndim: int) -> str:
    """Return the layout with a letter for each of `ndim` axes."""
    return "b" * (ndim - len(layout)) + layout


def list_axes(layout: str, kinds: str) -> list[int]:
    """Return the axes of a complete layout whose letter is in `kinds`, in order."""
    return [axis for axis, letter in enumerate(layout) if letter in kinds]


def sort_axes(layout: str) -> tuple[int, ...]:
    """Return all axes of a complete layout: batch axes, then inputs, then outputs."""
    return tuple(axis for letter in "bio" for axis in list_axes(layout, letter))


def invert_permutation(permutation: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that undoes `permutation`."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def split_shape(shape: Sequence[int], layout: str) -> tuple[tuple[int, ...], ...]:
    """Return three tuples: the sizes of the batch, input and output axes of `shape`."""
    layout = complete_layout(layout, len(shape))
    return tuple(
        tuple(shape[axis] for axis in list_axes(layout, letter)) for letter in "bio"
    )


def matrix_shape(shape: Sequence[int], layout: str) -> tuple[int, ...]:
    """Return [..., m, n], the shape of the matrix view of an array of `shape`."""
    batch, inputs, outputs = split_shape(shape, layout)
    return (*batch, math.prod(inputs), math.prod(outputs))


def view_matrix(array: Float[ArrayT, ...], layout: str) -> Float[ArrayT, "*batch m n"]:
    """Return the array as matrices: all inputs as rows, all outputs as columns."""
    shape = matrix_shape(array.shape, layout)
    order = sort_axes(complete_layout(layout, array.ndim))
    if order != tuple(range(array.ndim)):
        array = array.transpose(order)
    return array.reshape(shape)


def restore_layout(
    matrix: Float[ArrayT, "*batch m n"], layout: str, shape: Sequence[int]
) -> Float[ArrayT, ...]:
    """Return the array of `shape` whose matrix view is `matrix`."""
    order = sort_axes(complete_layout(layout, len(shape)))
    array = matrix.reshape(tuple(shape[axis] for axis in order))
    if order == tuple(range(len(shape))):
        return array
    return array.transpose(invert_permutation(order))
