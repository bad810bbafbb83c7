"""Weights that stay in their file until they are read: see `adapt`."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Tree
from jlora.factors import Factors
from jlora.layouts import restore_layout, view_matrix
from jlora.quantization.registry import register
from jlora.reconstruction.dense import reconstruct


class LazyArray:
    """An array that is read each time it is used; the base of an adapted weight.

    A subclass gives `shape`, `dtype` and `read`. `np.asarray(array)` reads it, and so
    does `jax.tree.map(jnp.asarray, tree)`, which puts all of a tree on the device.

    Example:
        >>> import numpy as np, jlora
        >>> class Ones(jlora.adaptation.LazyArray):
        ...     shape, dtype = (2, 3), np.dtype(np.float32)
        ...     def read(self):
        ...         return np.ones(self.shape, self.dtype)
        >>> Ones(), np.asarray(Ones()).sum()
        (Ones(float32[2,3]), np.float32(6.0))
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Return the values."""
        raise NotImplementedError(f"{type(self).__name__} must define read.")

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return f"{type(self).__name__}({np.dtype(self.dtype).name}[{sizes}])"


register(LazyArray, lambda array: jnp.asarray(array.read()))


class LazyResidual(LazyArray):
    """A weight without the delta of its first factors: w - scale * u @ v."""

    def __init__(
        self, weight: LazyArray, factors: Factors, scale: float, layout: str
    ) -> None:
        self._weight = weight
        self._factors = factors
        self._scale = scale
        self._layout = layout
        self.shape = weight.shape
        self.dtype = weight.dtype

    def read(self) -> np.ndarray:
        """Return the values, rounded once to the dtype of the weight."""
        with _keep_precision(self.dtype):
            w = jnp.asarray(self._weight.read())
            matrix = view_matrix(w, self._layout)
            base = reconstruct(self._factors, matrix, scale=-self._scale)
            return np.asarray(restore_layout(base, self._layout, w.shape))


def open_tree(params: Tree) -> Tree:
    """Return the dict of lazy arrays of an open checkpoint, or the tree itself."""
    list_arrays = getattr(params, "list_lazy_arrays", None)
    return params if list_arrays is None else list_arrays()


def _keep_precision(dtype: np.dtype) -> contextlib.AbstractContextManager:
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
