"""Gradient descent along the matrices of a fixed rank."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jlora._numerics import matmul, split_scale, times_power_of_two, to_compute
from jlora._types import Array, Int, Scalar, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.factors import Factors
from jlora.training.gradient_steps import solve_damped
from jlora.training.optimizers.weights import map_weights, require
from jlora.updates.products import balance_product
from jlora.updates.recompression import recompress

_DAMPING = 1e-6  # relative; only matters for factors that are not of full rank


class RiemannianState(NamedTuple):
    """State of `riemannian_sgd`."""

    num_steps: Int[Array, ""]  # updates made


def riemannian_sgd(
    learning_rate: Scalar | optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Return gradient descent on u @ v along the matrices of rank r.

    The gradient of the product is projected onto the tangent space at u @ v, a step is
    taken, and the sum, of rank 2r, is truncated to rank r again: the nearest such
    matrix. The m×n gradient is never formed, because the projection needs only its
    products with the two factors, which are the gradients of the factors. The new
    factors are balanced. Plain leaves get a step of SGD.

    It is a whole optimiser: the truncation depends on the length of the step, so
    nothing that rescales updates may come after it. Clipping may come before it.

    Args:
        learning_rate: number, or an optax schedule of the count of updates.

    Returns:
        optax.GradientTransformationExtraArgs. Its update needs `params`.

    Raises:
        ValueError: when it is initialised for a weight that does not train "uv" (with
            the path), or used without `params`.

    Cost: O((m + n) r² + r³) flops for each weight.

    Accuracy: the retraction is the metric projection. For factors that are not of full
        rank the projection is damped by 1e-6; at v = 0 it is a step inside the span of
        u.

    Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization", 2013;
        Absil and Oseledets, "Low-rank retractions", 2015.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, trainable="uv"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, x):
        ...     return jnp.sum((x @ params["w"]) ** 2)
        >>> optimizer = jlora.optimizers.riemannian_sgd(0.1)
        >>> batches = [jnp.eye(8)] * 10
        >>> result = jlora.fit(loss, adapted, optimizer, batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """

    return _make_optimizer(learning_rate, "riemannian_sgd", lambda tangent: tangent)


def riemannian_muon(
    learning_rate: Scalar | optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    """Return steps along the matrices of rank r with all singular values equal.

    As `riemannian_sgd`, but the projected gradient, a product of rank 2r, is replaced
    by its polar factor: its singular vectors stay, and its singular values become 1. So
    a step has the spectral norm `learning_rate`, whatever the scale of the loss, and
    directions of small gradients advance as fast as the others. Use a schedule that
    falls to zero: the length of the steps does not. Plain leaves get a step of signs.

    It is a whole optimiser, and scaling the gradient before it has no effect. Clipping
    is useless, and decay of the weights belongs after it only as `add_decayed_delta`.

    Args:
        learning_rate: spectral norm of a step; number, or an optax schedule of the
            count of updates.

    Returns:
        optax.GradientTransformationExtraArgs. Its update needs `params`.

    Raises:
        ValueError: as `riemannian_sgd`.

    Cost: O((m + n) r² + r³) flops for each weight.

    Source: Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein, "Muon: an optimizer
        for hidden layers in neural networks", 2024; Bogachev and others, "LoRA meets
        Riemannion: Muon optimizer for parametrization-independent low-rank adapters",
        2025. Differs: an exact polar factor in place of Newton-Schulz iterations, no
        momentum.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, trainable="uv"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, x):
        ...     return jnp.sum((x @ params["w"]) ** 2)
        >>> rate = optax.linear_schedule(0.3, 0.0, 20)
        >>> optimizer = jlora.optimizers.riemannian_muon(rate)
        >>> batches = [jnp.eye(8)] * 20
        >>> result = jlora.fit(loss, adapted, optimizer, batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0])
        True
    """
    return _make_optimizer(learning_rate, "riemannian_muon", _find_polar_factor)


def _make_optimizer(
    learning_rate: Scalar | optax.Schedule,
    name: str,
    change: Callable[[Factors], Factors],
) -> optax.GradientTransformationExtraArgs:
    """Return the optimiser that steps along the changed projection of the gradient."""

    def init(params: Tree) -> RiemannianState:
        map_weights(functools.partial(_check_trains_both, name), params)
        return RiemannianState(jnp.zeros((), jnp.int32))

    def update(
        updates: Tree,
        state: Any,  # RiemannianState
        params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, RiemannianState]:
        del extra_args
        params = require(params, "params", name)
        rate: Any = learning_rate
        if callable(rate):
            rate = rate(state.num_steps)

        def step(path: str, update: AdaptedWeight, weight: Any) -> AdaptedWeight:
            del path
            return _step_on_manifold(update, weight, rate, change)

        def descend(gradient: Array) -> Array:
            is_sign = change is _find_polar_factor
            direction = jnp.sign(gradient) if is_sign else gradient
            return (-rate * direction).astype(gradient.dtype)

        steps = map_weights(step, updates, params, other=descend)
        return steps, RiemannianState(state.num_steps + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_trains_both(name: str, path: str, weight: AdaptedWeight) -> AdaptedWeight:
    if weight.trainable != "uv" or weight.num_columns is not None:
        raise ValueError(
            f"{path}: `trainable` must be 'uv' for {name}, got "
            f"{weight.trainable!r}. Change the rule, or use another optimiser."
        )
    return weight


def _step_on_manifold(
    gradient: AdaptedWeight,
    weight: AdaptedWeight,
    rate: Scalar | Array,
    change: Callable[[Factors], Factors],
) -> AdaptedWeight:
    """Return new factors minus old ones."""
    u, v, du, dv = to_compute(weight.u, weight.v, gradient.u, gradient.v)
    rank = u.shape[-1]

    # du = G vᵀ and dv = uᵀ G hold the products of the gradient G of u @ v with both
    # factors; we need them with orthonormal bases of the factors.
    left_basis, left = _find_products(u, dv)  # left: basisᵀ G
    right_basis, right = _find_products(v.mT, du.mT)  # right: basisᵀ Gᵀ

    # Tangent: P(G) = Q Qᵀ G + (G R − Q Qᵀ G R) Rᵀ, with bases Q of u and R of v.
    image = right.mT
    outside = image - matmul(left_basis, matmul(left_basis.mT, image))

    tangent = change(
        Factors(
            jnp.concatenate([left_basis, outside], axis=-1),
            jnp.concatenate([left, right_basis.mT], axis=-2),
        )
    )

    # u v − rate P(G) as one product, truncated to the old rank.
    thin = jnp.concatenate([u, tangent.u], axis=-1)
    wide = jnp.concatenate([v, -rate * tangent.v], axis=-2)
    rank_kept = min(rank, u.shape[-2], v.shape[-1])
    new_u, new_v = balance_product(thin, wide, rank_kept)

    return dataclasses.replace(
        gradient,
        u=(new_u - u).astype(gradient.u.dtype),
        v=(new_v - v).astype(gradient.v.dtype),
    )


def _find_polar_factor(product: Factors) -> Factors:
    """Return u @ v with its nonzero singular values replaced by 1."""
    rank = min(*product.u.shape[-2:], product.v.shape[-1])
    u, s, vt = recompress(product, rank)
    # Below rounding, singular vectors are arbitrary.
    smallest = rank * jnp.finfo(s.dtype).eps * s[..., :1]
    is_kept = s > smallest
    return Factors(u * is_kept[..., None, :], vt)


def _find_products(factor: Array, product: Array) -> tuple[Array, Array]:
    """Return (basis, basisᵀ g) for a factor [m, r] and its product factorᵀ g [r, n].

    With factor = basis t, factorᵀ g = tᵀ (basisᵀ g), which is solved for basisᵀ g.
    """
    unit, exponent = split_scale(factor)
    basis, triangle = jnp.linalg.qr(unit)
    solved = solve_damped(triangle, matmul(triangle, product), _DAMPING)
    return basis, times_power_of_two(solved, -exponent)
