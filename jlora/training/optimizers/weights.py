"""Maps functions over the adapted weights of a tree of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from jlora._types import Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted
from jlora.adaptation.paths import format_path


def map_weights(
    fn: Callable[..., AdaptedWeight],
    updates: Tree,
    *trees: Tree,
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> Tree:
    """Return the updates with fn(path, update, ...) in place of each adapted weight.

    For the `update` function of your own transformation: `updates`, `params` and
    `frozen` are trees of one structure, in which an `AdaptedWeight` has None for each
    array that another tree holds.

    Args:
        fn: function of a path, an `AdaptedWeight` of updates, and the same node of each
            of the trees. It returns an `AdaptedWeight` of updates.
        updates: tree of updates.
        trees: more trees, such as params and frozen.
        other: function of the updates of plain leaves. Default: unchanged.

    Returns:
        The tree of new updates. Leaves that `optax.masked` hides stay hidden.

    Raises:
        ValueError: a weight of which `optax.masked` hides some arrays and not all.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jlora, optax
        >>> def update(updates, state, params=None, *, frozen, **extra_args):
        ...     def solve(path, update, rest):  # ScaledGD for v, with the frozen u
        ...         gram = rest.u.T @ rest.u
        ...         v = -0.1 * jnp.linalg.solve(gram, update.v)
        ...         return dataclasses.replace(update, v=v)
        ...     return jlora.optimizers.map_weights(solve, updates, frozen), state
        >>> scaled_gd = optax.GradientTransformationExtraArgs(lambda params: (), update)
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["w"]) ** 2)
        >>> batches = [jnp.eye(8)] * 10
        >>> result = jlora.fit(loss, adapted, scaled_gd, batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """

    def map_leaf(path: tuple, update: Any, *nodes: Any) -> Any:
        if is_adapted(update):
            return _map_weight(fn, format_path(path), update, nodes)
        return update if _is_empty(update) else other(update)

    return jax.tree_util.tree_map_with_path(
        map_leaf,
        updates,
        *trees,
        is_leaf=lambda node: _is_empty(node) or is_adapted(node),
    )


def require(value: Any, name: str, transformation: str) -> Any:
    """Return an argument of `update` that the transformation cannot work without."""
    if value is None:
        raise ValueError(
            f"`{name}` must be given to the update of {transformation}, got None. "
            "Train with jlora.fit or jlora.train_step, or pass it by name."
        )
    return value


def _map_weight(
    fn: Callable[..., AdaptedWeight], path: str, update: AdaptedWeight, nodes: Any
) -> AdaptedWeight:
    """Return fn of one weight, or the weight itself where all of it is hidden."""
    leaves = jax.tree.leaves(update, is_leaf=_is_masked)
    hidden = [_is_masked(leaf) for leaf in leaves]
    if all(hidden):
        return update
    if any(hidden):
        raise ValueError(
            f"{path}: `updates` must hold all trained arrays of a weight, got a mask "
            "over some of them. Give this transformation both factors: chain it before "
            "or after `by_path`, or let one entry of it match the whole weight."
        )
    return fn(path, update, *nodes)


def _is_empty(node: Any) -> bool:
    return node is None or _is_masked(node)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
