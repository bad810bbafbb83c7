"""ScaledGD as an optax transformation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax

from jlora._numerics import to_compute
from jlora._types import Array, Scalar, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.weight_trees import join_weight
from jlora.training.gradient_steps import solve_damped
from jlora.training.optimizers.weights import map_weights, require


def scale_by_factor_gram(
    delta: Scalar = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that divides by the other factor's Gram matrix.

    dv becomes (uᵀu + δ I)⁻¹ dv and du becomes du (v vᵀ + δ I)⁻¹; a core is
    preconditioned on both sides. The step on u @ v then does not depend on how the
    product is split into factors, and is not slowed by their condition. It also works
    if only v is trained, because `train_step` passes the frozen u. Updates of "s" and
    of plain leaves are unchanged.

    Use it first in a chain, before momentum and the learning rate:
    `optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.1))`. Do not put
    it before Adam, which divides by the size of the gradient again.

    Args:
        delta: δ relative to the mean diagonal of the Gram matrix, not negative.

    Returns:
        optax.GradientTransformationExtraArgs, without state. Its update needs `params`
        and `frozen`.

    Raises:
        ValueError: when it is used without `params` or `frozen`.

    Cost: O((m + n) r² + r³) flops for each weight.

    Source: Zhang and Pilanci, "Riemannian preconditioned LoRA for fine-tuning
        foundation models", 2024; Tong, Ma, Chi, "Accelerating ill-conditioned low-rank
        matrix estimation via scaled gradient descent", 2021. Differs: δ is relative.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["w"]) ** 2)
        >>> optimizer = optax.chain(
        ...     jlora.optimizers.scale_by_factor_gram(), optax.sgd(0.1))
        >>> batches = [jnp.eye(8)] * 10
        >>> result = jlora.fit(loss, adapted, optimizer, batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """

    def init(params: Tree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Tree,
        state: Any,  # EmptyState
        params: Tree | None = None,
        *,
        frozen: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, optax.EmptyState]:
        del extra_args
        params = require(params, "params", "scale_by_factor_gram")
        frozen = require(frozen, "frozen", "scale_by_factor_gram")

        def precondition(
            path: str, update: AdaptedWeight, own: Any, rest: Any
        ) -> AdaptedWeight:
            del path
            return _precondition(update, join_weight(own, rest), delta)

        return map_weights(precondition, updates, params, frozen), state

    return optax.GradientTransformationExtraArgs(init, update)


def _precondition(
    update: AdaptedWeight, weight: AdaptedWeight, delta: Scalar
) -> AdaptedWeight:
    u, v = to_compute(weight.u, weight.v)
    changed: dict[str, Array] = {}
    if update.v is not None:
        changed["v"] = _solve_left(u, update.v, delta)
    if update.u is not None:
        changed["u"] = _solve_left(v.mT, update.u.mT, delta).mT
    if update.core is not None and weight.trainable == "core":
        rows = _solve_left(u, update.core, delta)
        changed["core"] = _solve_left(v.mT, rows.mT, delta).mT
    return dataclasses.replace(update, **changed)


def _solve_left(factor: Array, rows: Array, delta: Scalar) -> Array:
    """Return (factorᵀ factor + δ I)⁻¹ rows, in the dtype of the rows."""
    solved = solve_damped(factor.mT, jnp.asarray(rows, factor.dtype), delta)
    return solved.astype(rows.dtype)
