"""The leaves of a tree of weights, by path."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from typing import Any

import jax

from jlora import _checks
from jlora._types import PRNGKey, Tree
from jlora.quantization.registry import is_registered


def list_leaves(
    params: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Return [(path, leaf)] of a pytree; a path joins its keys with "/".

    Arrays of a registered type are leaves.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, _stop_at_arrays(is_leaf))
    return [(format_path(path), leaf) for path, leaf in leaves]


def map_leaves(
    fn: Callable[[str, Any], Any],
    params: Tree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Tree:
    """Return the tree with fn(path, leaf) in place of each leaf of `list_leaves`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(format_path(path), leaf),
        params,
        is_leaf=_stop_at_arrays(is_leaf),
    )


def format_path(path: tuple) -> str:
    """Return the keys of a path, joined with "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sort_by_likeness(paths: list[str], pattern: str) -> list[str]:
    """Return the paths with those that are most like the pattern first."""

    def measure_likeness(path: str) -> float:
        return difflib.SequenceMatcher(None, pattern, path, autojunk=False).ratio()

    return sorted(paths, key=measure_likeness, reverse=True)


def fold_path(key: PRNGKey, path: str) -> PRNGKey:
    """Return the key of one path: other paths in the tree do not change it."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def why_not_a_matrix(leaf: Any, layout: str = "io") -> str | None:
    """Return why a leaf cannot be factorised, or None if it can."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"is a {type(leaf).__name__}, not an array"
    if not _checks.is_floating(leaf.dtype):
        return f"has dtype {leaf.dtype}, not a real floating one of 16 to 64 bits"

    shape = tuple(leaf.shape)
    if len(shape) < len(layout):
        numbers = {2: "two", 3: "three", 4: "four", 5: "five"}
        number = numbers.get(len(layout), len(layout))
        named = "" if layout == "io" else f" (layout {layout!r})"
        return f"has shape {shape}, fewer than {number} axes{named}"
    if 0 in shape:
        return f"has shape {shape}, no elements"
    return None


def why_stacked_vectors(path: str, pattern: str) -> str | None:
    """Return why a leaf is one vector for each layer by its name, None if it is not.

    A scan over layers stacks the biases [layers, n], which then look like a matrix.
    """
    names = path.removesuffix("/value").split("/")
    for word in ("bias", "scale"):
        if names[-1].endswith(word) and word not in pattern:
            return f"is named {names[-1]!r}, a stack of vectors"
    return None


def _stop_at_arrays(
    is_leaf: Callable[[Any], bool] | None,
) -> Callable[[Any], bool]:
    if is_leaf is None:
        return is_registered
    return lambda node: is_leaf(node) or is_registered(node)
