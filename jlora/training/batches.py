"""Batches of a training loop: converted, counted, and sent to the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._progress import report
from jlora._types import Tree

_TAKEN = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


class BatchFeed:
    """The batches of one run, in groups that are taken in one call of the device.

    A group is on the device before it is needed: ask for the next one while the device
    works on the one before.

    Args:
        batches: iterable of pytrees.
        group_size: batches in one group; a group ends early before a batch of another
            shape and at the end.
        num_batches: most batches to read, those before a resumption included.
    """

    def __init__(
        self, batches: Iterable[Any], group_size: int, num_batches: int | None
    ) -> None:
        self._iterator = iter(batches)
        self._group_size = group_size
        self._num_left = num_batches
        # A batch of another shape than the group before it, with its signature.
        self._waiting: tuple[Any, Any] | None = None
        self._error: BaseException | None = None  # that the next call raises
        self._shapes = ShapeCounter()
        self._paths: list[str] | None = None  # of the leaves of the first batch
        self._checked: Any = None  # signature of the last batch
        self.num_read = 0

    def skip(self, num_batches: int, iterator_state: Any) -> None:
        """Go on after batches that an earlier run has read.

        Args:
            num_batches: how many.
            iterator_state: of its iterator, if that has `get_state` as Grain's have.
                None: that many batches are read and dropped.
        """
        if iterator_state is not None and hasattr(self._iterator, "set_state"):
            self._iterator.set_state(iterator_state)  # type: ignore[attr-defined]
        else:
            for _ in itertools.islice(self._iterator, num_batches):
                pass
        self.num_read = num_batches
        if self._num_left is not None:
            self._num_left -= num_batches

    def get_place(self) -> tuple[int, Any]:
        """Return (batches read, state of the iterator or None if it has none)."""
        get = getattr(self._iterator, "get_state", None)
        is_ahead = self._waiting is not None
        return self.num_read, None if get is None or is_ahead else get()

    def next_group(self, limit: int | None = None) -> list[Any]:
        """Return the next batches, of one shape, on the device; empty at the end.

        Args:
            limit: most batches to return. None: as many as a group has.
        """
        size = self._group_size if limit is None else min(self._group_size, limit)
        group: list[Any] = []
        first: Any = None
        while len(group) < size:
            try:
                found = self._next_batch()
            except BaseException as error:
                if not group:
                    raise
                self._error = error  # after the batches before it were trained on
                break
            if found is None:
                break
            batch, signature = found
            if group and signature != first:
                self._waiting = found
                break
            first = signature
            group.append(batch)
        self.num_read += len(group)
        return group

    def _next_batch(self) -> tuple[Any, Any] | None:
        """Return (batch on the device, its signature), or None at the end."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._waiting is not None:
            found, self._waiting = self._waiting, None
            return found
        if self._num_left == 0:
            return None
        try:
            batch = to_arrays(next(self._iterator))
        except StopIteration:
            return None
        if self._num_left is not None:
            self._num_left -= 1
        leaves, structure = jax.tree.flatten(batch)
        signature = (structure, *map(_describe_leaf, leaves))
        if signature != self._checked:
            self._check_structure(batch)
            self._shapes.count(batch)
            self._checked = signature
        return jax.tree.unflatten(structure, map(_send, leaves)), signature

    def _check_structure(self, batch: Any) -> None:
        """Refuse a batch whose leaves have other paths than those of the first."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
        paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        if self._paths is None:
            self._paths = paths
        odd = sorted({*paths} ^ {*self._paths})
        if odd:
            where = "a new leaf" if odd[0] in paths else "no leaf"
            raise ValueError(
                "`batches` must have one structure, got "
                f"{where} at {odd[0] or 'the batch itself'} in batch "
                f"{self.num_read + 1}. Give all batches the same keys."
            )


def count_examples(batch: Tree) -> int:
    """Return the length of the first axis of a batch, or 0 if it has none."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    return next((shape[0] for shape in shapes if shape), 0)


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


def _send(leaf: Any) -> Any:
    # Numbers stay weakly typed: a Python float must not decide a dtype.
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _describe_leaf(leaf: Any) -> tuple:
    kind = getattr(leaf, "dtype", type(leaf))
    return np.shape(leaf), kind, getattr(leaf, "weak_type", False)


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
