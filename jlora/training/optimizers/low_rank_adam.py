"""Adam on gradients projected onto their leading directions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora import _checks
from jlora._numerics import compute_dtype, matmul, to_compute
from jlora._types import Array, Float, Int, PRNGKey, Tree
from jlora.factorization.svd import randomized_svd
from jlora.training.gradient_steps import transport_moments


class LowRankAdamState(NamedTuple):
    """State of `scale_by_low_rank_adam`."""

    num_steps: Int[Array, ""]  # updates made
    key: PRNGKey  # folded with the number of steps for each new basis
    moments: Tree  # a `_Moments` in the place of each leaf


class _Moments(NamedTuple):
    """Adam's moments of one leaf; a leaf that is too small to project has no basis."""

    basis: Float[Array, "*batch m r"] | None  # orthonormal columns
    first: Float[Array, "*batch r n"]  # or the shape of the leaf
    second: Float[Array, "*batch r n"]


def scale_by_low_rank_adam(
    rank: int,
    *,
    key: PRNGKey,
    update_every: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Return Adam for whole matrices, with moments of rank r instead of m×n.

    The gradient g is projected onto its r leading left singular vectors b, Adam runs on
    bᵀg, and the step is b times its result. The basis is renewed every `update_every`
    steps, and the moments are carried over to the new one. For matrices [..., m, n]
    with min(m, n) > r, such as plain weights trained with `also_train`; all other
    leaves, such as the thin factors, get Adam itself.

    Use it in the place of `optax.scale_by_adam`, before the learning rate:
    `optax.chain(scale_by_low_rank_adam(16, key=key), optax.scale(-1e-3))`.

    Args:
        rank: static, r ≥ 1.
        key: one typed PRNG key, consumed, for `randomized_svd`.
        update_every: static, steps between two bases, ≥ 1.
        b1, b2: decay rates of the first and second moment.
        eps: added to the root of the second moment.

    Returns:
        optax.GradientTransformationExtraArgs with a `LowRankAdamState`.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Cost: 4 m n r flops a step; a `randomized_svd` for each new basis. Memory (m + 2 n)
        r instead of 2 m n.

    Source: Zhao et al., "GaLore: memory-efficient LLM training by gradient low-rank
        projection", 2024; Robert et al., "LDAdam", 2024, for the moments. Differs: no
        error feedback.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> key = jax.random.key(0)
        >>> optimizer = jlora.optimizers.scale_by_low_rank_adam(2, key=key)
        >>> params = {"w": jnp.ones((20, 30))}
        >>> state = optimizer.init(params)
        >>> state.moments["w"].first.shape
        (2, 30)
        >>> updates, state = optimizer.update(params, state)
        >>> updates["w"].shape
        (20, 30)
    """
    rank = _checks.check_integer(rank, "rank")
    update_every = _checks.check_integer(update_every, "update_every")
    _checks.check_key(key)

    def init(params: Tree) -> LowRankAdamState:
        moments = jax.tree.map(lambda leaf: _init_moments(leaf, rank), params)
        return LowRankAdamState(jnp.zeros((), jnp.int32), key, moments)

    def update(
        updates: Tree,
        state: Any,  # LowRankAdamState
        params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, LowRankAdamState]:
        del params, extra_args
        own_key = jax.random.fold_in(state.key, state.num_steps)
        is_renewed = state.num_steps % update_every == 0
        count = state.num_steps + 1

        leaves, structure = jax.tree.flatten(updates)
        old = structure.flatten_up_to(state.moments)
        steps, moments = [], []
        for i, (gradient, own) in enumerate(zip(leaves, old, strict=True)):
            leaf_key = jax.random.fold_in(own_key, i)
            own = _renew_basis(gradient, own, leaf_key, is_renewed)
            step, own = _step_adam(gradient, own, count, (b1, b2, eps))
            steps.append(step)
            moments.append(own)

        new_state = LowRankAdamState(count, state.key, structure.unflatten(moments))
        return structure.unflatten(steps), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _init_moments(leaf: Array, rank: int) -> _Moments:
    dtype = compute_dtype(leaf.dtype)
    if leaf.ndim < 2 or min(leaf.shape[-2:]) <= rank:
        zeros = jnp.zeros(leaf.shape, dtype)
        return _Moments(None, zeros, zeros)

    *batch, m, n = leaf.shape
    zeros = jnp.zeros((*batch, rank, n), dtype)
    return _Moments(jnp.zeros((*batch, m, rank), dtype), zeros, zeros)


def _renew_basis(
    gradient: Array, moments: _Moments, key: PRNGKey, is_renewed: Array
) -> _Moments:
    """Return the moments in the leading directions of the gradient, if it is time."""
    if moments.basis is None:
        return moments

    def renew(moments: _Moments) -> _Moments:
        old = moments.basis
        assert old is not None
        new = randomized_svd(gradient, old.shape[-1], key=key).u
        first, second = transport_moments(moments.first, moments.second, old, new)
        return _Moments(new, first, second)

    return jax.lax.cond(is_renewed, renew, lambda moments: moments, moments)


def _step_adam(
    gradient: Array,
    moments: _Moments,
    count: Array,
    settings: tuple[float, float, float],
) -> tuple[Array, _Moments]:
    """Return Adam's step, in the dtype of the gradient, and the new moments."""
    b1, b2, eps = settings
    basis, first, second = moments
    g = to_compute(gradient)
    if basis is not None:
        g = matmul(basis.mT, g)

    first = b1 * first + (1 - b1) * g
    second = b2 * second + (1 - b2) * g**2
    mean, square = first / (1 - b1**count), second / (1 - b2**count)
    step = mean / (jnp.sqrt(square) + eps)

    if basis is not None:
        step = matmul(basis, step)
    new = _Moments(basis, first.astype(g.dtype), second.astype(g.dtype))
    return step.astype(gradient.dtype), new
