"""Pure functions on gradients: preconditioned, projected, their moments transported."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    eye_like,
    matmul,
    split_scale,
    times_power_of_two,
    to_compute,
)
from jlora._types import AnyArray, Array, Float, Scalar
from jlora.factorization.orthonormal import factor_rows
from jlora.factors import Factors


def precondition_gradient(
    factors: Factors, gradient: Factors, *, delta: Scalar = 1e-6
) -> Factors:
    """Return the gradients, each preconditioned by the other factor's Gram matrix.

    du (v vᵀ + δ I)⁻¹ and (uᵀu + δ I)⁻¹ dv. In this metric the step on the product does
    not depend on its split into factors, u → u G, v → G⁻¹ v, and the condition of the
    factors does not slow it down. `jlora.optimizers.scale_by_factor_gram` is the same
    for optax.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        gradient: the gradients of u and v, in `Factors` of the same shapes.
        delta: not negative, static or traced: δ is delta times the mean diagonal of the
            Gram matrix. It keeps the step finite if a factor has less than full rank.
            With 0 the invariance is exact, and such a factor gives NaN.

    Returns:
        `Factors` in the common compute dtype, to be multiplied by a learning rate and
        subtracted. If a factor is zero, the other's gradient is unchanged.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: O((m + n) r² + r³) flops.

    Accuracy: as the solution of a system with the condition of the factor, not of its
        Gram matrix: about 1e-4 in float32 for dependent columns at the default delta.

    Gradients: exact, to all arguments.

    Source: Zhang and Pilanci, "Riemannian preconditioned LoRA for fine-tuning
        foundation models", 2024; Tong, Ma, Chi, "Accelerating ill-conditioned low-rank
        matrix estimation via scaled gradient descent", 2021. Differs: δ is relative.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((3, 1), 2.0), jnp.full((1, 4), 0.5))
        >>> step = jlora.training.precondition_gradient(factors, factors, delta=0.0)
        >>> round(float(step.u[0, 0]), 4), round(float(step.v[0, 0]), 4)
        (2.0, 0.0417)
    """
    u, v = _checks.check_factors(factors)
    du, dv = _checks.check_factors(gradient, "gradient")
    _checks.check_shape(du.shape, u.shape, "gradient.u", "that of factors.u")
    _checks.check_shape(dv.shape, v.shape, "gradient.v", "that of factors.v")
    delta = _checks.check_scalar(delta, "delta", minimum=0)
    return _precondition_gradient(u, v, du, dv, delta)


@jax.jit
def _precondition_gradient(
    u: Float[Array, "*batch m r"],
    v: Float[Array, "*batch r n"],
    du: Float[Array, "*batch m r"],
    dv: Float[Array, "*batch r n"],
    delta: Scalar,
) -> Factors:
    u, v, du, dv = to_compute(u, v, du, dv)
    return Factors(solve_damped(v, du.mT, delta).mT, solve_damped(u.mT, dv, delta))


def solve_damped(
    root: Float[Array, "*batch r k"], rows: Float[Array, "*batch r n"], delta: Scalar
) -> Float[Array, "*batch r n"]:
    """Return (root rootᵀ + δ I)⁻¹ rows, with δ = delta times the mean diagonal.

    The Gram matrix itself would have the squared condition, and its rounding exceeds
    a δ of 1e-6 from a rank of 16 on. Instead a QR decomposition of the root, with √δ I
    below it, gives the Cholesky factor. NaN if it is singular, which needs delta = 0.
    """
    unit, exponent = split_scale(root)
    delta = jnp.asarray(delta, root.dtype)
    solved = _solve_unit(unit, rows, delta)
    # A zero root has no inverse; we return the rows unchanged.
    is_zero = jnp.all(unit == 0, axis=(-2, -1), keepdims=True)
    return times_power_of_two(solved, jnp.where(is_zero, 0, -2 * exponent))


@jax.custom_jvp
def _solve_unit(
    root: Float[Array, "*batch r k"],
    rows: Float[Array, "*batch r n"],
    delta: Float[Array, ""],
) -> Float[Array, "*batch r n"]:
    """Return the solution for a root with entries near one, or zero."""
    return _solve_triangular(_find_triangle(root, delta), rows)


@_solve_unit.defjvp
def _differentiate_solution(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # (G + δ I) dx = d rows - (dG + dδ I) x, with G = root rootᵀ and δ = delta mean.
    root, rows, delta = primals
    d_root, d_rows, d_delta = tangents
    upper = _find_triangle(root, delta)
    x = _solve_triangular(upper, rows)

    d_mean = 2 * jnp.sum(root * d_root, axis=(-2, -1), keepdims=True) / root.shape[-2]
    d_damping = delta * d_mean + d_delta * _find_mean(root)
    right = d_rows - matmul(d_root, matmul(root.mT, x)) - d_damping * x
    right = right - matmul(root, matmul(d_root.mT, x))
    return x, _solve_triangular(upper, right)


def _find_triangle(
    root: Float[Array, "*batch r k"], delta: Float[Array, ""]
) -> Float[Array, "*batch r r"]:
    """Return t with tᵀ t = root rootᵀ + δ I; NaN if singular, I for a zero root."""
    _, part = factor_rows(root)
    mean = _find_mean(part)
    eye = eye_like(matmul(part, part.mT))
    damping = jnp.sqrt(delta * mean) * eye
    upper = jnp.linalg.qr(jnp.concatenate([part.mT, damping], axis=-2), mode="r")

    diagonal = jnp.abs(jnp.diagonal(upper, axis1=-2, axis2=-1))[..., None, :]
    least, largest = (f(diagonal, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    is_singular = least <= 4 * jnp.finfo(upper.dtype).eps * largest
    upper = jnp.where(is_singular, jnp.nan, upper)
    return jnp.where(mean == 0, eye, upper)


def _find_mean(root: Float[Array, "*batch r k"]) -> Float[Array, "*batch 1 1"]:
    """Return the mean diagonal of root rootᵀ."""
    return jnp.sum(root**2, axis=(-2, -1), keepdims=True) / root.shape[-2]


def _solve_triangular(
    upper: Float[Array, "*batch r r"], rows: Float[Array, "*batch r n"]
) -> Float[Array, "*batch r n"]:
    """Return (upperᵀ upper)⁻¹ rows."""
    solve = functools.partial(jax.lax.linalg.triangular_solve, upper, left_side=True)
    return solve(solve(rows, transpose_a=True))


def project_gradient_out(
    gradient: Float[AnyArray, "*batch m n"],
    basis: Float[AnyArray, "*batch k p"],
    *,
    side: Literal["left", "right"] = "left",
) -> Float[Array, "*batch m n"]:
    """Return a gradient without its component in a protected subspace.

    g − b bᵀg (left) or g − g b bᵀ (right). A step along the result does not change the
    action of the weight on vectors of the subspace, so a new domain does not overwrite
    an old one. `jlora.optimizers.project_out` is the same for optax.

    Args:
        gradient: of a weight or of a factor.
        basis: orthonormal columns, k = m (left) or k = n (right), such as the leading
            right singular vectors of the old domain's activations (inputs x [t, m] of
            y = x w).
        side: static, "left" (inputs of x @ w are protected) or "right" (outputs).

    Returns:
        Array in the dtype of the gradient.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit, or another side.

    Cost: 4 m n p flops.

    Source: Saha, Garg, Roy, "Gradient projection memory for continual learning", 2021.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> basis = jnp.array([[1.0], [0.0]])
        >>> jlora.training.project_gradient_out(jnp.ones((2, 2)), basis).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """
    _checks.check_choice(side, ("left", "right"), "side")
    gradient = _checks.check_matrix(gradient, "gradient")
    basis = _checks.check_matrix(basis, "basis")
    size = gradient.shape[-2 if side == "left" else -1]

    expected = (*gradient.shape[:-2], size, basis.shape[-1])
    _checks.check_shape(
        basis.shape, expected, "basis", f"a row for each of the {side} side"
    )
    g, b = to_compute(gradient, basis)
    inside = (
        matmul(b, matmul(b.mT, g)) if side == "left" else matmul(matmul(g, b), b.mT)
    )
    return (g - inside).astype(gradient.dtype)


def transport_moments(
    first: Float[AnyArray, "*batch p n"],
    second: Float[AnyArray, "*batch p n"],
    old_basis: Float[AnyArray, "*batch m p"],
    new_basis: Float[AnyArray, "*batch m q"],
) -> tuple[Float[Array, "*batch q n"], Float[Array, "*batch q n"]]:
    """Return Adam's moments of a projected gradient, transported to another subspace.

    The projected gradient is bᵀg. If the basis b changes to b', the first moment
    becomes b'ᵀb m. The second, a mean of squares, becomes (b'ᵀb)∘² (v − m∘²) + (b'ᵀb
    m)∘²: the variances of coordinates assumed uncorrelated, plus the square of the new
    mean.

    Args:
        first: first moment, without Adam's bias correction.
        second: second moment, without Adam's bias correction.
        old_basis: orthonormal columns.
        new_basis: orthonormal columns.

    Returns:
        (first, second), each in its dtype; second is not negative.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: 2 m p q + 4 p q n flops.

    Source: Robert et al., "LDAdam: adaptive optimization from low-dimensional gradient
        statistics", 2024, section 3.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> moment = jnp.array([[1.0], [2.0]])
        >>> first, second = jlora.training.transport_moments(
        ...     moment, moment**2, jnp.eye(2), swap)
        >>> first.tolist(), second.tolist()
        ([[2.0], [1.0]], [[4.0], [1.0]])
    """
    first, second = (
        _checks.check_matrix(moment, name)
        for name, moment in (("first", first), ("second", second))
    )
    old = _checks.check_matrix(old_basis, "old_basis")
    new = _checks.check_matrix(new_basis, "new_basis")
    batch, (m, p) = old.shape[:-2], old.shape[-2:]

    _checks.check_shape(
        new.shape, (*batch, m, new.shape[-1]), "new_basis", "rows of old_basis"
    )
    _checks.check_shape(
        first.shape,
        (*batch, p, first.shape[-1]),
        "first",
        "a row for each column of old_basis",
    )
    _checks.check_shape(second.shape, first.shape, "second", "that of first")

    mean, square, old, new = to_compute(first, second, old, new)
    rotation = matmul(new.mT, old)
    carried = matmul(rotation, mean)
    variance = jnp.maximum(square - mean**2, 0)
    carried_square = matmul(rotation**2, variance) + carried**2
    return carried.astype(first.dtype), carried_square.astype(second.dtype)
