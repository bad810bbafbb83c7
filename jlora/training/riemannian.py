"""Steps along the matrices of fixed rank: projection, retraction, integration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    is_finite,
    matmul,
    power_of_two_scale,
    refuse_derivative,
    split_scale,
    to_compute,
)
from jlora._types import AnyArray, Array, Float, Int, Scalar
from jlora.factorization.core import decompose_core
from jlora.factorization.sketch import fixed_sketch
from jlora.factors import SVD, Factors, check_svd, fix_signs, mask_nonfinite, mask_rank
from jlora.updates.additive import add_low_rank, extend_basis

_NOT_DIFFERENTIABLE = (
    "`svd` and `change` must not be differentiated by integrate_low_rank, got a "
    "derivative request. Apply jax.lax.stop_gradient to them, or use retract."
)


class Tangent(NamedTuple):
    """A direction along the matrices of rank r: u @ core @ vt + left @ vt + u @ right.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (6, 4))
        >>> tangent = jlora.training.project_tangent(jlora.truncated_svd(a, 2), a)
        >>> tangent.core.shape, tangent.left.shape, tangent.right.shape
        ((2, 2), (6, 2), (2, 4))
    """

    core: Float[Array, "*batch r r"]
    left: Float[Array, "*batch m r"]  # orthogonal to u
    right: Float[Array, "*batch r n"]  # orthogonal to vt


def project_tangent(
    svd: SVD, gradient: Float[AnyArray, "*batch m n"] | Factors
) -> Tangent:
    """Return the component of a gradient along the matrices of the rank of an SVD.

    P(G) = u uᵀG + G vtᵀvt − u uᵀG vtᵀvt: the nearest direction in which the rank does
    not change, to first order.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n], the point.
        gradient: a matrix, or `Factors` of u [..., m, k], v [..., k, n] that stand for
            it and are never multiplied out.

    Returns:
        `Tangent` in the common compute dtype.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: two products with the gradient, 4 m n r flops, or O((m + n) r k).

    Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization", 2013,
        section 2.1.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 0.0])), 1)
        >>> jlora.training.project_tangent(svd, jnp.eye(2)).core.tolist()
        [[1.0]]
    """
    u, _, vt = check_svd(svd)
    return _project_tangent(u, vt, _check_change(gradient, u, vt, "gradient"))


@jax.jit
def _project_tangent(
    u: Float[Array, "*batch m r"],
    vt: Float[Array, "*batch r n"],
    gradient: tuple[Array, ...],
) -> Tangent:
    u, vt, *parts = to_compute(u, vt, *gradient)
    left, right = _multiply_right(parts, vt), _multiply_left(parts, u)
    core = matmul(u.mT, left)
    return Tangent(core, left - matmul(u, core), right - matmul(core, vt))


def retract(svd: SVD, tangent: Tangent, step: Scalar = 1.0) -> SVD:
    """Return the SVD of u diag(s) vt + step * tangent, truncated to the same rank.

    The sum has at most twice the rank, in known bases; we truncate its small SVD.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n], the point.
        tangent: `Tangent` there, as by `project_tangent`.
        step: factor of the tangent, static or traced; negative to descend along a
            gradient.

    Returns:
        `SVD` of the same shapes in the common compute dtype.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: as `add_low_rank` with a term of twice the rank.

    Accuracy: the distance to the straight line is of second order in the step.

    Source: Absil and Oseledets, "Low-rank retractions: a survey and new results", 2015,
        the metric projection.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 0.0])), 1)
        >>> tangent = jlora.training.project_tangent(svd, jnp.eye(2))
        >>> jlora.training.retract(svd, tangent, -0.5).s.round(4).tolist()
        [1.5]
    """
    u, s, vt = check_svd(svd)
    if not isinstance(tangent, Tangent):
        raise TypeError(
            f"`tangent` must be a Tangent, got {type(tangent).__name__}. "
            "Make one with jlora.training.project_tangent."
        )
    core, left, right = (
        _checks.check_matrix(part, f"tangent.{name}")
        for name, part in zip(Tangent._fields, tangent, strict=True)
    )
    _checks.check_shape(
        core.shape, (*s.shape, s.shape[-1]), "tangent.core", "rank by rank"
    )
    _checks.check_shape(left.shape, u.shape, "tangent.left", "that of svd.u")
    _checks.check_shape(right.shape, vt.shape, "tangent.right", "that of svd.vt")

    # u core vt + left vt + u right as one product of twice the rank.
    u, s, vt, core, left, right = to_compute(u, s, vt, core, left, right)
    step = jnp.asarray(_checks.check_scalar(step, "step"), u.dtype)
    x = jnp.concatenate([left + matmul(u, core), u], axis=-1)
    y = jnp.concatenate([vt, right], axis=-2)
    return add_low_rank(SVD(u, s, vt), step * x, y, rank=s.shape[-1])


class IntegratedSVD(NamedTuple):
    """The result of `integrate_low_rank`; unpacks as (svd, rank).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 1.0])), 2)
        >>> change = -jnp.eye(2)
        >>> svd, rank = jlora.training.integrate_low_rank(svd, change, tolerance=0.1)
        >>> int(rank), svd.s.round(4).tolist()
        (1, [1.0, 0.0])
    """

    svd: SVD  # of max_rank, zero beyond the rank kept
    rank: Int[Array, "*batch"]


def integrate_low_rank(
    svd: SVD,
    change: Float[AnyArray, "*batch m n"] | Factors,
    *,
    tolerance: Scalar = 0.0,
    max_rank: int | None = None,
) -> IntegratedSVD:
    """Return the SVD after one step a → a + change of the rank-adaptive BUG integrator.

    K = a vtᵀ + change vtᵀ and L = aᵀu + changeᵀu, each with the old basis, span new
    bases. In them the small matrix takes the whole step (Galerkin), and its SVD is
    truncated. Small singular values do no harm, and nothing is integrated backwards.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        change: a matrix, or `Factors` that stand for it: a step of a flow, such as
            minus a learning rate times a gradient.
        tolerance: not negative, static or traced: the truncated singular values have a
            Frobenius norm of at most this fraction of the whole.
        max_rank: static, R, at most min(m, n, 2 r). None: r.

    Returns:
        `IntegratedSVD` of an `SVD` of u [..., m, R], s [..., R], vt [..., R, n], zero
        beyond the rank kept, and that rank, at least 1.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit, or a max_rank out of its range.

    Cost: three products with the change and O((m + n) r²) flops.

    Accuracy: exact if a and a + change both have at most rank r and no direction of one
        is orthogonal to all of the other. Otherwise of first order, with a constant
        that does not depend on the singular values.

    Gradients: refused with a TypeError: the bases and the rank jump with the values.

    Source: Ceruti, Kusch, Lubich, "A rank-adaptive robust integrator for dynamical
        low-rank approximation", 2022.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 0.0])), 1)
        >>> change = jnp.diag(jnp.array([1.0, 0.0]))
        >>> jlora.training.integrate_low_rank(svd, change).svd.s.round(4).tolist()
        [3.0]
    """
    u, s, vt = check_svd(svd)
    arrays = _check_change(change, u, vt, "change")
    limit = min(u.shape[-2], vt.shape[-1], 2 * s.shape[-1])
    tolerance = _checks.check_scalar(tolerance, "tolerance", minimum=0)
    max_rank = s.shape[-1] if max_rank is None else max_rank
    max_rank = _checks.check_integer(max_rank, "max_rank", maximum=limit)
    refuse = functools.partial(refuse_derivative, message=_NOT_DIFFERENTIABLE)
    svd, arrays = jax.tree.map(refuse, (SVD(u, s, vt), arrays))
    return _integrate(svd, arrays, tolerance, max_rank)


@functools.partial(jax.jit, static_argnames="max_rank")
def _integrate(
    svd: SVD, change: tuple[Array, ...], tolerance: Scalar, max_rank: int
) -> IntegratedSVD:
    u, s, vt, *parts = to_compute(*svd, *change)
    # With the old bases, K and L span no more than the products with the change.
    left, right = _multiply_right(parts, vt), _multiply_left(parts, u)
    rows, columns = _join_bases(u.mT, left.mT), _join_bases(vt, right)

    # The whole step in the new bases.
    core = matmul(matmul(rows, u) * s[..., None, :], matmul(vt, columns.mT))
    core = core + matmul(_multiply_left(parts, rows.mT), columns.mT)
    width = min(core.shape[-2:])
    noise = fixed_sketch(width, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, width, noise, is_reduced=False)

    # tail[k] is the norm that truncation to rank k removes.
    unit_s = split_scale(s, axis=-1).unit
    tail = jnp.sqrt(jnp.cumsum(unit_s[..., ::-1] ** 2, axis=-1)[..., ::-1])
    allowed = jnp.asarray(tolerance, s.dtype) * tail[..., :1]
    rank = jnp.sum(tail > allowed, axis=-1)
    rank = jnp.clip(rank, 1, max_rank).astype(jnp.int32)

    new_u = matmul(rows.mT, e[..., :max_rank])
    new_vt = matmul(f[..., :max_rank, :], columns)
    kept = mask_rank(SVD(new_u, s[..., :max_rank], new_vt), rank)
    return IntegratedSVD(mask_nonfinite(fix_signs(kept), is_finite(core)), rank)


def _join_bases(
    basis: Float[Array, "*batch r m"], change: Float[Array, "*batch k m"]
) -> Float[Array, "*batch l m"]:
    """Return orthonormal rows that span the rows of both."""
    if basis.shape[-2] + change.shape[-2] >= basis.shape[-1]:
        whole = jnp.eye(basis.shape[-1], dtype=basis.dtype)
        return jnp.broadcast_to(whole, (*basis.shape[:-2], *whole.shape))
    return extend_basis(basis, change / power_of_two_scale(change))[0]


def _check_change(
    change: AnyArray | Factors, u: Array, vt: Array, name: str
) -> tuple[Array, ...]:
    """Return a dense change, or its two factors, as a tuple of arrays, checked."""
    expected = (*u.shape[:-1], vt.shape[-1])
    meaning = "that of the svd's matrix"
    if isinstance(change, tuple):
        left, right = _checks.check_factors(change, name)
        shape = (*left.shape[:-1], right.shape[-1])
        _checks.check_shape(shape, expected, f"{name}.u @ {name}.v", meaning)
        return left, right

    matrix = _checks.check_matrix(change, name)
    _checks.check_shape(matrix.shape, expected, name, meaning)
    return (matrix,)


def _multiply_right(
    change: Sequence[Array], vt: Float[Array, "*batch r n"]
) -> Float[Array, "*batch m r"]:
    """Return change @ vtᵀ."""
    *left, last = change
    product = matmul(last, vt.mT)
    return matmul(left[0], product) if left else product


def _multiply_left(
    change: Sequence[Array], u: Float[Array, "*batch m r"]
) -> Float[Array, "*batch r n"]:
    """Return uᵀ @ change."""
    first, *right = change
    product = matmul(u.mT, first)
    return matmul(product, right[0]) if right else product
