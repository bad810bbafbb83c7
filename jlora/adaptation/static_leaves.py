"""Leaves that JAX does not take, such as functions, as static parts of a tree.

An Equinox module holds its activation functions as leaves. `jax.jit` refuses them as
arguments; as static parts they pass.
"""

from __future__ import annotations

from typing import Any

import jax


@jax.tree_util.register_static
class StaticLeaf:
    """A leaf that is no array and no number, as a node without children."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticLeaf):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:
            return hash(type(self.value))

    def __repr__(self) -> str:
        return f"StaticLeaf({self.value!r})"


def hide_static(leaf: Any) -> Any:
    """Return a leaf that JAX takes unchanged, and any other as a `StaticLeaf`."""
    is_number = isinstance(leaf, (bool, int, float, complex))
    return leaf if is_number or hasattr(leaf, "dtype") else StaticLeaf(leaf)


def show_static(leaf: Any) -> Any:
    """Return what `hide_static` hid."""
    return leaf.value if isinstance(leaf, StaticLeaf) else leaf
