"""The best low-rank approximation as a differentiable function of the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import matmul, safe_divide, to_compute
from jlora._types import AnyArray, Array, Bool, Float, Int, PRNGKey
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD

# Conjugate gradients stop at a relative residual near rounding, or after this many
# steps. They suffice for a gap σₖ / σₖ₊₁ of 1.01. At a smaller gap the derivative is
# ill-conditioned in any case.
_MAX_STEPS = 200


class _State(NamedTuple):
    """Conjugate gradients, one independent problem per column."""

    step: int | Int[Array, ""]
    x: Float[Array, "*batch m r"]
    residual: Float[Array, "*batch m r"]
    direction: Float[Array, "*batch m r"]
    square: Float[Array, "*batch 1 r"]  # squared norms of the residual


def low_rank_approximation(
    a: Float[AnyArray, "*batch m n"], rank: int, *, key: PRNGKey
) -> Float[Array, "*batch m n"]:
    """Return the best rank-`rank` approximation of each matrix, differentiably.

    a ↦ aₖ = u diag(s) vᵀ is the gradient of ½ Σᵢ≤ₖ σᵢ², so its Jacobian is
    self-adjoint. The map is smooth wherever σₖ > σₖ₊₁, because it depends on the span
    of the leading singular vectors and not on the vectors themselves. Let
    a_⊥ = a − aₖ, and P the projections onto the orthogonal complements of u and v:

        D aₖ[da] = u (uᵀ da v) vᵀ + X diag(s) vᵀ + u diag(s) Yᵀ,
        (σⱼ² − a_⊥ a_⊥ᵀ) xⱼ = σⱼ P_u da vⱼ + a_⊥ P_v daᵀ uⱼ,
        yⱼ = (P_v daᵀ uⱼ + a_⊥ᵀ xⱼ) / σⱼ.

    Args:
        a: real floating.
        rank: static, 1 ≤ rank ≤ min(m, n).
        key: one typed PRNG key, consumed by the decomposition.

    Returns:
        The approximation in the compute dtype.

    Raises:
        TypeError: `a` is not a real floating array, `rank` not a static integer, or
            `key` not a typed key.
        ValueError: `rank` is out of range.

    Cost: as `randomized_svd`. The derivative takes two thin products with `a` per step
        of conjugate gradients: about ten steps for a gap σₖ / σₖ₊₁ of 1.1.

    Accuracy: as `randomized_svd` at its default setting.

    Gradients: exact, forward and reverse, also if singular values repeat inside the
        leading `rank`. Where σₖ = σₖ₊₁ the map has no derivative, and the returned one
        is finite but meaningless. Higher-order derivatives are not supported: JAX
        refuses them, or they are wrong.

    Source: the Sylvester equation of the truncated decomposition, as in Wan and Zhang,
        "Automatic differentiation for complex valued SVD", 2019. Differs: we solve it
        in the equations above, by conjugate gradients.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> a = jnp.diag(jnp.array([3.0, 3.0, 1.0]))  # repeated singular values
        >>> key = jax.random.key(0)
        >>> def energy(a):
        ...     return 0.5 * jnp.sum(jlora.low_rank_approximation(a, 2, key=key) ** 2)
        >>> jax.grad(energy)(a).round(4).tolist()
        [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    """
    a = _checks.check_matrix(a)
    rank = _checks.check_rank(rank, a.shape)
    _checks.check_key(key)
    return _approximate(to_compute(a), key, rank)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _approximate(
    a: Float[Array, "*batch m n"], key: PRNGKey, rank: int
) -> Float[Array, "*batch m n"]:
    return _multiply_out(randomized_svd(a, rank, key=key))


@_approximate.defjvp
def _differentiate_approximation(
    rank: int,
    primals: tuple[Float[Array, "*batch m n"], PRNGKey],
    tangents: tuple[Float[Array, "*batch m n"], Any],  # Any: a key has no tangent
) -> tuple[Float[Array, "*batch m n"], Float[Array, "*batch m n"]]:
    a, key = primals
    a = jax.lax.stop_gradient(a)
    svd = randomized_svd(a, rank, key=key)
    return _multiply_out(svd), _differentiate(a, svd, tangents[0])


def _multiply_out(svd: SVD) -> Float[Array, "*batch m n"]:
    return matmul(svd.u * svd.s[..., None, :], svd.vt)


def _differentiate(
    a: Float[Array, "*batch m n"], svd: SVD, tangent: Float[Array, "*batch m n"]
) -> Float[Array, "*batch m n"]:
    """Return D aₖ[tangent], see `low_rank_approximation`."""
    u, s, v = svd.u, svd.s[..., None, :], svd.vt.mT

    # The tangent in the singular vectors: uᵀ da v, P_u da v, P_v daᵀ u.
    da_v, dat_u = matmul(tangent, v), matmul(tangent.mT, u)
    inside = matmul(u.mT, da_v)
    outside_u, outside_v = _project_out(u, da_v), _project_out(v, dat_u)

    def multiply_rest(y: Float[Array, "*batch n r"]) -> Float[Array, "*batch m r"]:
        return _project_out(u, matmul(a, y))  # a_⊥ y, for y orthogonal to v

    def multiply_rest_transposed(
        x: Float[Array, "*batch m r"],
    ) -> Float[Array, "*batch n r"]:
        return _project_out(v, matmul(a.mT, x))  # a_⊥ᵀ x, for x orthogonal to u

    # In units of the largest singular value: scales like 1e±15 square to 0 or infinity.
    unit = jnp.where(s[..., :1] > 0, s[..., :1], 1)
    s = s / unit

    def apply_operator(x: Float[Array, "*batch m r"]) -> Float[Array, "*batch m r"]:
        once = multiply_rest_transposed(x) / unit
        return x * s**2 - multiply_rest(once) / unit

    # Solve for X, and compute Y from it.
    right_side = s * outside_u + multiply_rest(outside_v) / unit
    x = jax.lax.custom_linear_solve(
        apply_operator, right_side, _solve_positive, symmetric=True
    )
    y = safe_divide(outside_v + multiply_rest_transposed(x) / unit, s)

    sides = matmul(x * s, v.mT) + matmul(u, (y * s).mT)
    return matmul(u, matmul(inside, v.mT)) + sides


def _solve_positive(
    operator: Callable[[Float[Array, "*batch m r"]], Float[Array, "*batch m r"]],
    right_side: Float[Array, "*batch m r"],
) -> Float[Array, "*batch m r"]:
    """Return the solution of operator(x) = right_side, by conjugate gradients.

    The columns are independent problems. Each has its own step lengths, and stops when
    its residual is at the rounding level of its right-hand side.
    """
    eps = jnp.finfo(right_side.dtype).eps
    threshold = (4 * eps) ** 2 * _dot_columns(right_side, right_side)

    def is_open(state: _State) -> Bool[Array, ""]:
        return (state.step < _MAX_STEPS) & jnp.any(state.square > threshold)

    def iterate(state: _State) -> _State:
        step, x, residual, direction, square = state

        # A finished column gets steps of length zero.
        image = operator(direction)
        curvature = _dot_columns(direction, image)
        is_usable = (square > threshold) & (curvature > 0)
        length = jnp.where(is_usable, square / jnp.where(is_usable, curvature, 1), 0)
        x, residual = x + length * direction, residual - length * image

        new_square = jnp.where(is_usable, _dot_columns(residual, residual), 0)
        ratio = jnp.where(is_usable, new_square / jnp.where(is_usable, square, 1), 0)
        return _State(step + 1, x, residual, residual + ratio * direction, new_square)

    square = _dot_columns(right_side, right_side)
    zeros = jnp.zeros_like(right_side)
    state = _State(0, zeros, right_side, right_side, square)
    return jax.lax.while_loop(is_open, iterate, state).x


def _dot_columns(
    x: Float[Array, "*batch m r"], y: Float[Array, "*batch m r"]
) -> Float[Array, "*batch 1 r"]:
    return jnp.sum(x * y, axis=-2, keepdims=True)


def _project_out(
    basis: Float[Array, "*batch k r"], x: Float[Array, "*batch k r"]
) -> Float[Array, "*batch k r"]:
    """Return x minus its projection onto the columns of `basis`."""
    return x - matmul(basis, matmul(basis.mT, x))
