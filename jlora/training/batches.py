"""Batches of a training loop, with arrays of other libraries converted."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jlora._progress import report
from jlora._types import Tree

_TAKEN = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def to_arrays(batch: Tree) -> Tree:
    """Return the batch with arrays of other libraries, such as torch, as NumPy arrays.

    Raises:
        TypeError: a leaf that is no array and no number, with its path.
    """
    if all(isinstance(leaf, _TAKEN) for leaf in jax.tree.leaves(batch)):
        return batch
    return jax.tree_util.tree_map_with_path(_to_array, batch)


def _to_array(path: tuple, leaf: Any) -> Any:
    if isinstance(leaf, _TAKEN):
        return leaf
    if hasattr(leaf, "__array__"):
        return np.asarray(leaf)
    name = jax.tree_util.keystr(path) or "the batch itself"
    raise TypeError(
        f"`batches` must hold arrays and numbers, got {type(leaf).__name__} at {name}. "
        "Leave it out, or convert it."
    )


class ShapeCounter:
    """Counts the shapes of batches, and says once that there are many of them."""

    MOST = 8  # shapes before it speaks: a last short batch and a few lengths are usual

    def __init__(self) -> None:
        self._seen: set[tuple] = set()

    def count(self, batch: Tree) -> None:
        """Take note of the shapes of a batch; each new one compiles the step again."""
        if len(self._seen) > self.MOST:
            return
        self._seen.add(tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch)))
        if len(self._seen) > self.MOST:
            report(
                f"fit: the batches have more than {self.MOST} shapes, and each one "
                "compiles the step again. Pad them to a few."
            )
