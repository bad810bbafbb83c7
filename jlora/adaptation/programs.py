"""The compiled part of `adapt`: one matrix, or a chunk of them, decomposed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.initializers.from_weight import INITIALIZATIONS
from jlora.layouts import restore_layout, view_matrix


class How(NamedTuple):
    """What a compiled program depends on beside shapes and dtypes; hashable."""

    init: str
    rank: int
    quantize: object
    num_rounds: int
    layout: str  # of one matrix as it is stored, without batch axes
    moves_base: bool  # whether a base comes out


def start_all(ws, scales, keys, datas, *, how):
    """Return (base, u, v, core, is_good) of each matrix of a chunk, computed as one batch."""
    if len(ws) == 1:
        return (start_matrix(ws[0], scales[0], keys[0], datas[0], how),)
    stacked = jax.tree.map(
        lambda *parts: jnp.stack(parts), *zip(ws, scales, keys, datas, strict=True)
    )
    started = jax.vmap(functools.partial(start_matrix, how=how))(*stacked)
    return tuple(jax.tree.map(lambda part: part[i], started) for i in range(len(ws)))  # noqa: B023


start_chunk = jax.jit(start_all, static_argnames="how")
start_donated = jax.jit(start_all, static_argnames="how", donate_argnames="ws")


def start_matrix(w, scale, key, data, how):
    """Return (base or None, u, v, core or None, is_good) of one matrix as it is stored."""
    kind = INITIALIZATIONS[how.init]
    settings = {}
    if how.quantize is not None:
        settings = {"quantize": how.quantize, "num_rounds": how.num_rounds}
    start = kind.start(
        view_matrix(w, how.layout), how.rank, scale, key, data, **settings
    )
    base = restore_layout(start.base, how.layout, w.shape) if how.moves_base else None
    # NaN or Inf in w reaches every factor made of it: looking at w itself would cost a pass.
    looked_at = tuple(start.factors) if kind.sees_weight else (*start.factors, w)
    is_good = functools.reduce(
        jnp.logical_and, [jnp.all(jnp.isfinite(a)) for a in looked_at]
    )
    return base, *start.factors, start.core, is_good
