"""Trees with adapted weights, split into a trainable and a frozen tree, and joined."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from jlora._types import Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted
from jlora.adaptation.paths import list_leaves, map_leaves, sort_by_likeness
from jlora.adaptation.static_leaves import hide_static, show_static


def split_trainable(
    adapted: Tree, *, also_train: str | None = None
) -> tuple[Tree, Tree]:
    """Return (trainable, frozen): two trees of one structure.

    Each holds None where the other has an array. Of an `AdaptedWeight` the trainable
    tree holds the arrays named by `trainable`, for "core" and "s" its core. With
    `num_columns=k` it holds the last k columns of v, and the frozen tree the others.
    A leaf that JAX does not take, such as a function of an Equinox module, becomes a
    static part of the frozen tree, so that both pass through `jax.jit`.

    Args:
        adapted: tree from `adapt`.
        also_train: regular expression on the paths of plain floating leaves to train
            too (norms, biases, the whole model with ".*"). None: none of them.

    Returns:
        Two pytrees; `join` is the exact inverse.

    Raises:
        TypeError: `also_train` is no string.
        ValueError: there is nothing to train, or `also_train` is no regular expression
            or matches no plain floating leaf.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> trainable, frozen = jlora.split_trainable(
        ...     jlora.adapt(params, plan, key=jax.random.key(0)))
        >>> [leaf.shape for leaf in jax.tree.leaves(trainable)]
        [(1, 3)]
    """
    _check_also_train(also_train, adapted)
    is_trained = functools.partial(_is_trained, also_train)
    trained = map_leaves(is_trained, adapted, is_leaf=is_adapted)
    trainable = jax.tree.map(_take_trainable, trained, adapted, is_leaf=is_adapted)
    frozen = jax.tree.map(_take_frozen, trained, adapted, is_leaf=is_adapted)

    if not jax.tree.leaves(trainable):
        raise ValueError(
            "`adapted` must hold something to train, got no adapted weight. "
            "Call jlora.adapt first, or name plain leaves with also_train."
        )
    return trainable, frozen


def join(trainable: Tree, frozen: Tree) -> Tree:
    """Return the tree that `split_trainable` split, bit for bit.

    Args:
        trainable: the tree of trained arrays.
        frozen: the tree of the others.

    Returns:
        The adapted tree.

    Raises:
        ValueError: the trees have different structures.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, num_columns=2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> jlora.join(*jlora.split_trainable(adapted))["w"].v.shape
        (1, 3)
    """
    return jax.tree.map(_join_leaf, trainable, frozen, is_leaf=_is_none_or_adapted)


def join_weight(trainable: AdaptedWeight, frozen: AdaptedWeight) -> AdaptedWeight:
    """Return the adapted weight that `split_trainable` split."""
    u = frozen.u if trainable.u is None else trainable.u
    core = frozen.core if trainable.core is None else trainable.core
    parts = [v for v in (frozen.v, trainable.v) if v is not None]
    v = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return dataclasses.replace(frozen, u=u, v=v, core=core)


def _check_also_train(also_train: Any, adapted: Tree) -> None:
    if also_train is None:
        return
    if not isinstance(also_train, str):
        raise TypeError(
            "`also_train` must be a regular expression in a string, got "
            f"{type(also_train).__name__}. Join several with |."
        )
    try:
        re.compile(also_train)
    except re.error as error:
        raise ValueError(
            f"`also_train` must be a regular expression, got {also_train!r} ({error}). "
            "Escape it."
        ) from None

    leaves = list_leaves(adapted, is_leaf=is_adapted)
    plain = [path for path, leaf in leaves if _is_trained(".*", path, leaf)]
    plain = [path for path, leaf in leaves if path in plain and not is_adapted(leaf)]
    if not any(re.search(also_train, path) for path in plain):
        nearest = ", ".join(sort_by_likeness(plain, also_train)[:8]) or "none"
        raise ValueError(
            "`also_train` must match a plain floating leaf, got "
            f"{also_train!r} without one. The nearest paths are: {nearest}."
        )


def _is_none_or_adapted(leaf: Any) -> bool:
    return leaf is None or is_adapted(leaf)


def _is_trained(also_train: str | None, path: str, leaf: Any) -> bool:
    if is_adapted(leaf):
        return True
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return (
        also_train is not None and is_float and re.search(also_train, path) is not None
    )


def _take_trainable(is_trained: bool, leaf: Any) -> Any:
    if not is_adapted(leaf):
        return leaf if is_trained else None

    arrays: dict[str, Any] = dict.fromkeys(("base", "u", "v", "scale", "core"))
    if leaf.trainable in ("core", "s"):
        arrays["core"] = leaf.core
    if "u" in leaf.trainable:
        arrays["u"] = leaf.u
    if "v" in leaf.trainable:
        arrays["v"] = leaf.v[..., _first_trained_column(leaf) :]
    return dataclasses.replace(leaf, **arrays)


def _take_frozen(is_trained: bool, leaf: Any) -> Any:
    if not is_adapted(leaf):
        return None if is_trained else hide_static(leaf)
    if leaf.trainable in ("core", "s"):
        return dataclasses.replace(leaf, core=None)

    u = None if "u" in leaf.trainable else leaf.u
    v = leaf.v
    if "v" in leaf.trainable:
        first = _first_trained_column(leaf)
        v = leaf.v[..., :first] if first else None
    return dataclasses.replace(leaf, u=u, v=v)


def _first_trained_column(leaf: AdaptedWeight) -> int:
    return 0 if leaf.num_columns is None else leaf.v.shape[-1] - leaf.num_columns


def _join_leaf(trainable: Any, frozen: Any) -> Any:
    if is_adapted(frozen):
        return join_weight(trainable, frozen)
    return show_static(frozen) if trainable is None else trainable
