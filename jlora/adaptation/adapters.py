"""Adapters as things of their own: taken from a tree, put into another, written as plain deltas."""

import dataclasses

import jax.numpy as jnp

from jlora import _checks
from jlora.adaptation.adapted_weight import is_adapted
from jlora.adaptation.paths import list_leaves, map_leaves
from jlora.factors import Factors, pad_rank, split_svd
from jlora.updates.recompression import concatenate_factors, recompress


def get_factors(adapted):
    """Return the adapter of a tree: {path: Factors}, scale and core multiplied into u.

    Args:
        adapted: tree from `adapt`.

    Returns:
        {path: `Factors`} of u [..., m, r], v [..., r, n]: what is added to each base.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora", scale=2.0))
        >>> list(jlora.adaptation.get_factors(jlora.adapt(params, plan, key=jax.random.key(0))))
        ['w']
    """
    leaves = list_leaves(adapted, is_leaf=is_adapted)
    return {path: _scale_factors(leaf) for path, leaf in leaves if is_adapted(leaf)}


def set_factors(adapted, factors, *, scale=1.0):
    """Return the tree with another adapter on the same bases, in arrays of the same shapes.

    Ranks below those of the tree are filled up with zeros, which changes nothing, and the scale is
    an array: a program compiled for one adapter runs for each other. Make the tree with
    init="lora", which leaves the bases as they were, for adapters of the plain model.

    Args:
        adapted: tree from `adapt`, with no core.
        factors: {path: `Factors`}, or a sequence of such, whose deltas are added up. A weight
            that is not in it gets none.
        scale: number, or one for each of the sequence; static or traced.

    Returns:
        The tree.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: a path that is not adapted, shapes that do not fit, more rank than there is
            room for (with the path), a weight with a core, or another number of scales.

    Cost: that of copying the factors.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.zeros((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, init="lora"))
        >>> slots = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> task = {"w": jlora.Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
        >>> jlora.merge(jlora.adaptation.set_factors(slots, task, scale=0.5))["w"][0].tolist()
        [0.5, 0.5, 0.5]
    """
    adapters = _list_adapters(factors)
    is_list = isinstance(scale, (list, tuple)) or jnp.ndim(scale) > 0
    scales = list(scale) if is_list else [scale] * len(adapters)
    if not adapters or len(scales) != len(adapters):
        raise ValueError(
            f"`scale` must be a number or one for each of the adapters, got {len(scales)} for "
            f"{len(adapters)}. Pass as many."
        )
    known = {
        path
        for path, leaf in list_leaves(adapted, is_leaf=is_adapted)
        if is_adapted(leaf)
    }
    for unknown in sorted(set().union(*adapters) - known):
        raise ValueError(
            f"`factors` must be of adapted weights, got {unknown!r} beside "
            f"{', '.join(sorted(known)[:8]) or 'none'}. Match it with a rule of the plan."
        )

    def swap(path, leaf):
        if not is_adapted(leaf):
            return leaf
        own = [
            (adapter[path], scale)
            for adapter, scale in zip(adapters, scales, strict=True)
            if path in adapter
        ]
        return _swap_leaf(path, leaf, own)

    return map_leaves(swap, adapted, is_leaf=is_adapted)


def extract_delta(initial, trained, *, rank=None):
    """Return what training has changed, as an adapter of the plain weights.

    An initialisation that moves the base makes factors that mean nothing without that base. The
    change is s (u v - u₀ v₀) = s [u, -u₀] [v; v₀], exactly, of twice the rank.

    Shapes: m inputs, n outputs, r rank.

    Args:
        initial: tree from `adapt`, before training; its bases are not looked at.
        trained: the same tree after it.
        rank: static; the delta is cut to its best approximation of this rank, or to as much as a
            weight has. None: the exact one.

    Returns:
        {path: `Factors`} of u [..., m, 2r], v [..., 2r, n] (or of `rank`), the scale multiplied
        in: for `set_factors` on the plain weights, or for a file.

    Raises:
        TypeError: `rank` is no integer.
        ValueError: the trees do not have the same adapted weights.

    Cost: that of copying the factors; with a rank that of `recompress`.

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
        odd = sorted(old.keys() ^ new.keys())
        raise ValueError(
            f"`trained` must adapt the weights that `initial` does, got {', '.join(odd[:8])} in "
            "one alone. Pass the tree that adapt returned and the one trained from it."
        )
    return {path: _subtract(path, new[path], old[path], rank) for path in new}


def _list_adapters(factors):
    adapters = [factors] if isinstance(factors, dict) else factors
    is_list = isinstance(adapters, (list, tuple)) and not isinstance(adapters, Factors)
    for adapter in adapters if is_list else [adapters]:
        if not isinstance(adapter, dict):
            raise TypeError(
                "`factors` must be a dict {path: Factors} or a list of such, got "
                f"{type(adapter).__name__}. Say which weight they are for."
            )
    return list(adapters)


def _scale_factors(leaf):
    u, v = leaf.factors
    return Factors(u * jnp.asarray(leaf.scale, u.dtype), v)


def _subtract(path, new, old, rank):
    try:
        delta = concatenate_factors([new, old], [1.0, -1.0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if rank is None:
        return delta
    limit = min(delta.u.shape[-2], *delta.v.shape[-2:])
    return pad_rank(
        split_svd(recompress(delta, min(rank, limit))), min(rank, delta.u.shape[-1])
    )


def _swap_leaf(path, leaf, own):
    if leaf.core is not None:
        raise ValueError(
            f"{path}: `adapted` must hold plain factors to be swapped, got part {leaf.trainable!r} with "
            "a core between them. Adapt with init='lora'."
        )
    room = leaf.u.shape[-1]
    if not own:
        zero = Factors(jnp.zeros_like(leaf.u), jnp.zeros_like(leaf.v))
        return _put_factors(leaf, zero, 1.0)
    pairs = [_checks.check_factors(pair, f"factors[{path!r}]") for pair, _ in own]
    for u, v in pairs:
        expected = (*leaf.u.shape[:-1], u.shape[-1])
        _checks.check_shape(u.shape, expected, f"factors[{path!r}].u", "inputs, rank")
        expected = (*leaf.v.shape[:-2], u.shape[-1], leaf.v.shape[-1])
        _checks.check_shape(v.shape, expected, f"factors[{path!r}].v", "rank, outputs")
    rank = sum(u.shape[-1] for u, _ in pairs)
    if rank > room:
        raise ValueError(
            f"{path}: `factors` must have a rank of at most {room} in all, the tree's, got {rank}. "
            "Adapt with a larger rank, or recompress them."
        )
    if len(own) == 1:
        return _put_factors(leaf, Factors(*pairs[0]), own[0][1])
    joined = concatenate_factors(
        [Factors(*pair) for pair in pairs], [scale for _, scale in own]
    )
    return _put_factors(leaf, joined, 1.0)


def _put_factors(leaf, factors, scale):
    u, v = pad_rank(factors, leaf.u.shape[-1])
    return dataclasses.replace(
        leaf,
        u=u.astype(leaf.u.dtype),
        v=v.astype(leaf.v.dtype),
        scale=jnp.asarray(scale, leaf.scale.dtype),
    )
