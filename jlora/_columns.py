"""Columns of a matrix that a caller names: a count, a slice or indices, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._checks import check_integer
from jlora._types import AnyArray, Int

# A count k of the last columns, a slice, or indices.
Columns: TypeAlias = int | slice | Sequence[int] | Int[AnyArray, " k"]


def check_columns(columns: Any, num_columns: int, name: str = "columns") -> Any:
    """Return column indices from an int k (the last k), a slice or a list of indices.

    Concrete indices are checked for range and repetition, and returned as a NumPy array
    of values in [0, num_columns). Traced indices are returned unchecked.
    """
    if isinstance(columns, slice):
        indices = np.arange(num_columns)[columns]
    elif isinstance(columns, Tracer) and columns.ndim == 1:
        return _check_index_dtype(columns, name)
    elif np.ndim(columns) == 0:
        count = check_integer(columns, name, maximum=num_columns)
        return np.arange(num_columns - count, num_columns)
    else:
        indices = np.asarray(columns)
        if indices.shape == (0,):
            indices = indices.astype(int)  # NumPy makes floats of an empty list
        indices = _check_index_dtype(indices, name)
    return _check_indices(indices, num_columns, name)


def _check_index_dtype(indices: Any, name: str) -> Any:
    """Return `indices` if they are integers on one axis."""
    if indices.ndim != 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be an integer k (the last k), a slice, or a 1-D array of "
            f"integers, got dtype {indices.dtype} of shape {indices.shape}. "
            "Convert a mask with np.flatnonzero."
        )
    return indices


def _check_indices(
    indices: Int[np.ndarray, " k"], num_columns: int, name: str
) -> Int[np.ndarray, " k"]:
    """Return unique indices in [0, num_columns) from possibly negative ones."""
    if indices.size == 0:
        raise ValueError(
            f"`{name}` must name at least one column, got none. Leave it out instead."
        )
    is_outside = (indices < -num_columns) | (indices >= num_columns)
    if is_outside.any():
        raise ValueError(
            f"`{name}` must lie in [-{num_columns}, {num_columns}), "
            f"got {indices[is_outside][0]}. Count the columns of the matrix."
        )

    indices = indices % num_columns
    if np.unique(indices).size != indices.size:
        raise ValueError(
            f"`{name}` must name each column once, got {indices.tolist()}. "
            "Remove the repetitions."
        )
    return indices
