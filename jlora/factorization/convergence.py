"""Singular vectors iterated until only rounding is left, for derivatives."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import matmul
from jlora._types import Array, Bool, Float, Int, PRNGKey
from jlora.factorization.full import decompose_fully
from jlora.factorization.iteration import decompose_randomly
from jlora.factors import SVD

# The derivative takes singular vectors that have converged to rounding. Each round
# restarts block Krylov from the triplets of the last one.
_PASSES_PER_ROUND = 16
_MAX_ROUNDS = 40
_LEAST_FOLLOWING = 8  # triplets beyond the rank: they speed up both iterations
# Residuals, in eps σ₁: rounds end at the first; the derivative is NaN above the second.
_RESIDUAL_TO_REACH, _RESIDUAL_TO_ACCEPT = 16, 64
# The error of the derivative is at most about 50 eps σ₁ / (σₖ − σₖ₊₁). It is NaN where
# the gap is smaller than this, in eps σ₁.
_LEAST_GAP = 500


class Converged(NamedTuple):
    """The leading triplets to rounding, and approximate ones that follow them."""

    leading: SVD  # as many as the rank that is differentiated
    following: SVD  # at least one
    is_exact: Bool[Array, "*batch 1 1"]  # whether the derivative keeps its bound


class _RoundState(NamedTuple):
    """The rounds of `_iterate_to_rounding`."""

    num_rounds: int | Int[Array, ""]
    svd: SVD
    residuals: Float[Array, "*batch r"]  # of each triplet, ‖a v − σ u‖ or its twin


def converge(a: Float[Array, "*batch m n"], svd: SVD, key: PRNGKey) -> Converged:
    """Return the leading triplets of `a` to rounding, starting from those of `svd`."""
    rank, limit = svd.s.shape[-1], min(a.shape[-2:])
    width = rank + max(_LEAST_FOLLOWING, rank)
    eps = jnp.finfo(a.dtype).eps

    if width * (_PASSES_PER_ROUND // 2 + 1) > limit:
        found = decompose_fully(a, limit)
        residuals = jnp.zeros_like(found.s)  # rounding
    else:
        found, residuals = _iterate_to_rounding(a, svd, key, width)

    # Whether the triplets, and the gap below them, are known well enough.
    largest, gap = found.s[..., 0], found.s[..., rank - 1] - found.s[..., rank]
    is_resolved = gap > _LEAST_GAP * eps * largest
    worst = jnp.max(residuals[..., :rank], axis=-1)
    is_converged = worst <= _RESIDUAL_TO_ACCEPT * eps * largest
    is_gap_known = residuals[..., rank] <= 0.1 * gap

    u, s, vt = found
    return Converged(
        SVD(u[..., :rank], s[..., :rank], vt[..., :rank, :]),
        SVD(u[..., rank:], s[..., rank:], vt[..., rank:, :]),
        (is_resolved & is_converged & is_gap_known)[..., None, None],
    )


def _iterate_to_rounding(
    a: Float[Array, "*batch m n"], svd: SVD, key: PRNGKey, width: int
) -> tuple[SVD, Float[Array, "*batch width"]]:
    """Return `width` triplets and their residuals, after as many rounds as needed."""
    rank = svd.s.shape[-1]
    eps = jnp.finfo(a.dtype).eps

    def run_round(num_rounds: Array | int, svd: SVD) -> _RoundState:
        round_key = jax.random.fold_in(key, num_rounds)
        svd = decompose_randomly(a, round_key, svd, width, _PASSES_PER_ROUND, width)
        return _RoundState(num_rounds + 1, svd, _find_residuals(a, svd))

    def is_open(state: _RoundState) -> Bool[Array, ""]:
        s, residuals = state.svd.s, state.residuals
        allowed = _RESIDUAL_TO_REACH * eps * s[..., :1]
        is_far = jnp.any(residuals[..., :rank] > allowed, axis=-1)
        # The first triplet that is not kept decides whether the gap is known.
        gap = s[..., rank - 1] - s[..., rank]
        is_gap_open = residuals[..., rank] > jnp.maximum(0.05 * gap, allowed[..., 0])
        return (state.num_rounds < _MAX_ROUNDS) & jnp.any(is_far | is_gap_open)

    state = jax.lax.while_loop(
        is_open, lambda state: run_round(state.num_rounds, state.svd), run_round(0, svd)
    )
    return state.svd, state.residuals


def _find_residuals(
    a: Float[Array, "*batch m n"], svd: SVD
) -> Float[Array, "*batch r"]:
    """Return the larger of ‖a v − σ u‖ and ‖aᵀ u − σ v‖ for each triplet."""
    u, s, v = svd.u, svd.s[..., None, :], svd.vt.mT
    left = jnp.linalg.norm(matmul(a, v) - s * u, axis=-2)
    right = jnp.linalg.norm(matmul(a.mT, u) - s * v, axis=-2)
    return jnp.maximum(left, right)
