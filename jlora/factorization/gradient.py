"""The best low-rank approximation as a differentiable function of the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    matmul,
    refuse_derivative,
    safe_divide,
    split_scale,
    to_compute,
)
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, PRNGKey
from jlora.factorization.conjugate_gradients import solve_positive
from jlora.factorization.convergence import Converged, converge
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD

_HIGHER_ORDER = (
    "`a` must be differentiated at most once by low_rank_approximation, got a request "
    "for a derivative of its derivative. Use truncated_svd, or finite differences of "
    "the first derivative."
)


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

    Cost: as `randomized_svd`. The derivative iterates the singular vectors to rounding,
        in rounds of 16 passes on 2 `rank` vectors (or by a full SVD of a small matrix),
        and takes two thin products with `a` per step of conjugate gradients. It copies
        `a` once.

    Accuracy: the value as `randomized_svd` at its default setting.

    Gradients: forward and reverse, also if singular values repeat inside the leading
        `rank`. They are derivatives of the exact aₖ, with a relative error of about
        3 eps σ₁ / (σₖ − σₖ₊₁), at most 50. NaN where that is not reached: for a gap
        σₖ − σₖ₊₁ below 500 eps σ₁ (6e-5 σ₁ in float32), where the map has no derivative
        or none that the dtype can resolve, and if the iterations do not converge.
        Higher-order derivatives are refused with a TypeError.

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


@follow_axes("*b m n", None, result="*b m n")
def _approximate(
    a: Float[Array, "*batch m n"], key: PRNGKey, rank: int
) -> Float[Array, "*batch m n"]:
    return _approximate_automatic(a, key, rank)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _approximate_automatic(
    a: Float[Array, "*batch m n"], key: PRNGKey, rank: int
) -> Float[Array, "*batch m n"]:
    return _multiply_out(randomized_svd(a, rank, key=key))


@_approximate_automatic.defjvp
def _differentiate_approximation(
    rank: int,
    primals: tuple[Float[Array, "*batch m n"], PRNGKey],
    tangents: tuple[Float[Array, "*batch m n"], Any],  # Any: a key has no tangent
) -> tuple[Float[Array, "*batch m n"], Float[Array, "*batch m n"]]:
    a, key = primals
    a = refuse_derivative(a, _HIGHER_ORDER)
    svd = randomized_svd(a, rank, key=key)
    value = _multiply_out(svd)
    if rank == min(a.shape[-2:]):
        return value, tangents[0]  # the approximation is the matrix itself

    # The derivative does not change if the matrix is scaled.
    unit = split_scale(a).unit
    converged = converge(unit, svd, key)
    tangent = _differentiate(unit, converged, tangents[0])
    # A product and not a choice: the transpose of a choice is zero, not NaN.
    return value, tangent * jnp.where(converged.is_exact, 1, jnp.nan).astype(a.dtype)


def _multiply_out(svd: SVD) -> Float[Array, "*batch m n"]:
    return matmul(svd.u * svd.s[..., None, :], svd.vt)


def _differentiate(
    a: Float[Array, "*batch m n"],
    converged: Converged,
    tangent: Float[Array, "*batch m n"],
) -> Float[Array, "*batch m n"]:
    """Return D aₖ[tangent], see `low_rank_approximation`."""
    svd = converged.leading
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

    def apply_operator(x: Float[Array, "*batch m r"]) -> Float[Array, "*batch m r"]:
        return x * s**2 - multiply_rest(multiply_rest_transposed(x))

    def solve(
        operator: Callable[[Array], Array], right_side: Float[Array, "*batch m r"]
    ) -> Float[Array, "*batch m r"]:
        precondition = _make_preconditioner(s, converged.following)
        return solve_positive(operator, precondition, right_side)

    # Solve for X, and compute Y from it.
    right_side = s * outside_u + multiply_rest(outside_v)
    x = jax.lax.custom_linear_solve(apply_operator, right_side, solve, symmetric=True)
    y = safe_divide(outside_v + multiply_rest_transposed(x), s)

    sides = matmul(x * s, v.mT) + matmul(u, (y * s).mT)
    return matmul(u, matmul(inside, v.mT)) + sides


def _make_preconditioner(
    s: Float[Array, "*batch 1 r"], following: SVD
) -> Callable[[Float[Array, "*batch m r"]], Float[Array, "*batch m r"]]:
    """Return an approximate inverse of σⱼ² − a_⊥ a_⊥ᵀ, for column j.

    It is exact along the left vectors of `following`, where the operator is smallest,
    and 1 / σⱼ² across them.
    """
    u, below = following.u, following.s[..., :, None]
    difference = (s - below) * (s + below)  # σⱼ² − σᵢ², without cancellation
    extra = safe_divide(below**2, difference)  # σⱼ² / (σⱼ² − σᵢ²) − 1

    def precondition(x: Float[Array, "*batch m r"]) -> Float[Array, "*batch m r"]:
        return safe_divide(x + matmul(u, extra * matmul(u.mT, x)), s**2)

    return precondition


def _project_out(
    basis: Float[Array, "*batch k r"], x: Float[Array, "*batch k r"]
) -> Float[Array, "*batch k r"]:
    """Return x minus its projection onto the columns of `basis`."""
    return x - matmul(basis, matmul(basis.mT, x))
