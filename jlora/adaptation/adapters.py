"""Adapters of an adapted tree: read out, exchanged, and made for the plain weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jlora import _checks
from jlora._types import Array, Scalar, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted
from jlora.adaptation.paths import list_leaves, map_leaves
from jlora.factors import Factors, pad_rank, split_svd
from jlora.updates.recompression import concatenate_factors, recompress

Adapter = dict[str, Factors]  # path of a weight: its delta


def get_factors(adapted: Tree) -> Adapter:
    """Return {path: Factors}, with scale and core multiplied into u.

    Args:
        adapted: tree from `adapt`.

    Returns:
        {path: `Factors`} of u [..., m, r], v [..., r, n]: the delta of each base.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora", scale=2.0))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> list(jlora.adaptation.get_factors(adapted))
        ['w']
    """
    leaves = list_leaves(adapted, is_leaf=is_adapted)
    return {path: _scale_factors(leaf) for path, leaf in leaves if is_adapted(leaf)}


def set_factors(
    adapted: Tree,
    factors: Adapter | Sequence[Adapter],
    *,
    scale: Scalar | Sequence[Scalar] = 1.0,
) -> Tree:
    """Return the tree with another adapter on the same bases, in equal shapes.

    Smaller ranks are padded with zeros, and the scale is an array, so a program
    compiled for one adapter runs for every other. Make the tree with init="lora", which
    leaves the bases unchanged, for adapters of the plain model.

    Args:
        adapted: tree from `adapt`, with no core.
        factors: {path: `Factors`}, or a sequence of them whose deltas are added. A
            weight without factors gets a delta of zero.
        scale: number, or one for each of the sequence; static or traced.

    Returns:
        The tree.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: a path that is not adapted, shapes that do not fit, a larger rank
            than the tree's (with the path), a weight with a core, or another number of
            scales.

    Cost: a copy of the factors.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.zeros((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, init="lora"))
        >>> slots = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> task = {"w": jlora.Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
        >>> filled = jlora.adaptation.set_factors(slots, task, scale=0.5)
        >>> jlora.merge(filled)["w"][0].tolist()
        [0.5, 0.5, 0.5]
    """
    adapters = _list_adapters(factors)
    scales = _list_scales(scale, len(adapters))
    _check_paths(adapted, adapters)

    def replace_delta(path: str, leaf: Any) -> Any:
        if not is_adapted(leaf):
            return leaf
        pairs = zip(adapters, scales, strict=True)
        own = [(adapter[path], own) for adapter, own in pairs if path in adapter]
        return _replace_delta(path, leaf, own)

    return map_leaves(replace_delta, adapted, is_leaf=is_adapted)


def extract_delta(initial: Tree, trained: Tree, *, rank: int | None = None) -> Adapter:
    """Return the change made by training, as an adapter of the plain weights.

    Factors of an initializer that moves the base mean nothing without that base. The
    change is s (u v − u₀ v₀) = s [u, −u₀] [v; v₀], exactly, of twice the rank.

    Args:
        initial: tree from `adapt`, before training; its bases are not read.
        trained: the same tree after training.
        rank: static, truncate the delta to its best approximation of this rank (or of
            the largest rank that a weight has). None: the exact delta.

    Returns:
        {path: `Factors`} of u [..., m, 2r], v [..., 2r, n] (or of `rank`), with the
        scale multiplied in: for `set_factors` on the plain weights, or for a file.

    Raises:
        TypeError: `rank` is no integer.
        ValueError: the trees have different adapted weights.

    Cost: a copy of the factors; with a rank also `recompress`.

    Source: the conversion of PiSSA to LoRA, Meng, Wang, Zhang 2024, appendix.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> before = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> after = {"w": dataclasses.replace(before["w"], v=before["w"].v + 1)}
        >>> jlora.adaptation.extract_delta(before, after)["w"].u.shape
        (8, 4)
    """
    if rank is not None:
        rank = _checks.check_integer(rank, "rank")

    old, new = get_factors(initial), get_factors(trained)
    if old.keys() != new.keys():
        different = sorted(old.keys() ^ new.keys())
        raise ValueError(
            "`trained` must adapt the same weights as `initial`, got "
            f"{', '.join(different[:8])} in only one of them. Pass the tree that adapt "
            "returned and the one trained from it."
        )
    return {path: _subtract(path, new[path], old[path], rank) for path in new}


def _list_adapters(factors: Any) -> list[Adapter]:
    is_sequence = isinstance(factors, (list, tuple))
    if isinstance(factors, Factors) or not is_sequence:
        factors = [factors]
    for adapter in factors:
        if not isinstance(adapter, dict):
            raise TypeError(
                "`factors` must be a dict {path: Factors} or a list of such, got "
                f"{type(adapter).__name__}. Say which weight they are for."
            )
    return list(factors)


def _list_scales(scale: Any, num_adapters: int) -> list[Any]:
    is_list = isinstance(scale, (list, tuple)) or jnp.ndim(scale) > 0
    scales = [*scale] if is_list else [scale for _ in range(num_adapters)]
    if not num_adapters or len(scales) != num_adapters:
        raise ValueError(
            "`scale` must be a number or one for each of the adapters, got "
            f"{len(scales)} for {num_adapters}. Pass as many."
        )
    return scales


def _check_paths(adapted: Tree, adapters: list[Adapter]) -> None:
    leaves = list_leaves(adapted, is_leaf=is_adapted)
    known = {path for path, leaf in leaves if is_adapted(leaf)}
    for unknown in sorted(set().union(*adapters) - known):
        raise ValueError(
            f"`factors` must be of adapted weights, got {unknown!r} beside "
            f"{', '.join(sorted(known)[:8]) or 'none'}. Match it with a rule of the "
            "plan."
        )


def _scale_factors(leaf: AdaptedWeight) -> Factors:
    u, v = leaf.factors
    return Factors(u * jnp.asarray(leaf.scale, u.dtype), v)


def _subtract(path: str, new: Factors, old: Factors, rank: int | None) -> Factors:
    try:
        delta = concatenate_factors([new, old], [1.0, -1.0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if rank is None:
        return delta

    limit = min(delta.u.shape[-2], *delta.v.shape[-2:])
    truncated = split_svd(recompress(delta, min(rank, limit)))
    return pad_rank(truncated, min(rank, delta.u.shape[-1]))


def _replace_delta(
    path: str, leaf: AdaptedWeight, own: list[tuple[Factors, Scalar]]
) -> AdaptedWeight:
    """Return the weight with the sum of some deltas instead of its own."""
    if leaf.core is not None:
        raise ValueError(
            f"{path}: `adapted` must hold plain factors to be replaced, got trainable "
            f"{leaf.trainable!r} with a core between them. Adapt with init='lora'."
        )
    if not own:
        zero = Factors(jnp.zeros_like(leaf.u), jnp.zeros_like(leaf.v))
        return _put_factors(leaf, zero, 1.0)

    pairs = [_check_pair(path, leaf, pair) for pair, _ in own]
    _check_total_rank(path, leaf, pairs)
    if len(own) == 1:
        return _put_factors(leaf, pairs[0], own[0][1])
    joined = concatenate_factors(pairs, [scale for _, scale in own])
    return _put_factors(leaf, joined, 1.0)


def _check_pair(path: str, leaf: AdaptedWeight, pair: Factors) -> Factors:
    name = f"factors[{path!r}]"
    u, v = _checks.check_factors(pair, name)
    rank = u.shape[-1]
    _checks.check_shape(
        u.shape, (*leaf.u.shape[:-1], rank), f"{name}.u", "inputs, rank"
    )
    expected = (*leaf.v.shape[:-2], rank, leaf.v.shape[-1])
    _checks.check_shape(v.shape, expected, f"{name}.v", "rank, outputs")
    return Factors(u, v)


def _check_total_rank(path: str, leaf: AdaptedWeight, pairs: list[Factors]) -> None:
    rank, limit = sum(pair.u.shape[-1] for pair in pairs), leaf.u.shape[-1]
    if rank > limit:
        raise ValueError(
            f"{path}: `factors` must have a rank of at most {limit} in all, the "
            f"tree's, got {rank}. Adapt with a larger rank, or recompress them."
        )


def _put_factors(
    leaf: AdaptedWeight, factors: Factors, scale: Scalar | Array
) -> AdaptedWeight:
    u, v = pad_rank(factors, leaf.u.shape[-1])
    return dataclasses.replace(
        leaf,
        u=u.astype(leaf.u.dtype),
        v=v.astype(leaf.v.dtype),
        scale=jnp.asarray(scale, leaf.scale.dtype),
    )
