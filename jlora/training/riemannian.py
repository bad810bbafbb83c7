"""Steps along the matrices of a fixed rank: projected, retracted, integrated."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    frobenius_norm,
    is_finite,
    matmul,
    power_of_two_scale,
    to_compute,
)
from jlora.factorization.core import decompose_core
from jlora.factorization.sketch import fixed_sketch
from jlora.factors import SVD, check_svd, fix_signs, mask_nonfinite
from jlora.updates.additive import add_low_rank, extend_basis


class Tangent(NamedTuple):
    """A direction along the matrices of rank r: u @ core @ vt + left @ vt + u @ right.

    Shapes: m, n rows and columns, r rank.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (6, 4))
        >>> tangent = jlora.training.project_tangent(jlora.truncated_svd(a, 2), a)
        >>> tangent.core.shape, tangent.left.shape, tangent.right.shape
        ((2, 2), (6, 2), (2, 4))
    """

    core: jax.Array  # [..., r, r]
    left: jax.Array  # [..., m, r], orthogonal to u
    right: jax.Array  # [..., r, n], orthogonal to vt


def project_tangent(svd, gradient):
    """Return the part of a gradient along the matrices of the rank of an SVD.

    P(G) = u uᵀG + G vtᵀvt − u uᵀG vtᵀvt: the nearest direction in which the rank, to first
    order, does not change.

    Shapes: m, n rows and columns, r rank, k the rank of a gradient given as factors.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n], the point.
        gradient: [..., m, n] real floating, or `Factors` of u [..., m, k], v [..., k, n] that
            stand for it and are never multiplied out.

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
def _project_tangent(u, vt, gradient):
    u, vt, *gradient = to_compute(u, vt, *gradient)
    left, right = _multiply_right(gradient, vt), _multiply_left(gradient, u)
    core = matmul(u.mT, left)
    return Tangent(core, left - matmul(u, core), right - matmul(core, vt))


def retract(svd, tangent, step=1.0):
    """Return the SVD of the nearest matrix of the same rank to u diag(s) vt + step * tangent.

    The sum has at most twice the rank, in bases that are at hand; its small SVD is cut.

    Shapes: m, n rows and columns, r rank.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n], the point.
        tangent: `Tangent` there, as by `project_tangent`.
        step: factor of the tangent, static or traced; negative to descend along a gradient.

    Returns:
        `SVD` of the same shapes in the common compute dtype.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: that of `add_low_rank` with a term of twice the rank.

    Accuracy: the distance to the straight line is of second order in the step.

    Source: Absil and Oseledets, "Low-rank retractions: a survey and new results", 2015, the
        metric projection.

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
    u, s, vt, core, left, right = to_compute(u, s, vt, core, left, right)
    step = jnp.asarray(step, u.dtype)
    x = jnp.concatenate([left + matmul(u, core), u], axis=-1)
    y = jnp.concatenate([vt, right], axis=-2)
    return add_low_rank(SVD(u, s, vt), step * x, y, rank=s.shape[-1])


class IntegratedSVD(NamedTuple):
    """What `integrate_low_rank` gives back; unpacks as (svd, rank).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 1.0])), 2)
        >>> svd, rank = jlora.training.integrate_low_rank(svd, -jnp.eye(2), tolerance=0.1)
        >>> int(rank), svd.s.round(4).tolist()
        (1, [1.0, 0.0])
    """

    svd: SVD  # of the most rank, zero beyond the rank kept
    rank: jax.Array  # [...] int32


def integrate_low_rank(svd, change, *, tolerance=0.0, max_rank=None):
    """Return the SVD after one step a → a + change of the rank-adaptive BUG integrator.

    K = a vtᵀ + change vtᵀ and L = aᵀu + changeᵀu, each with the old basis, span new bases; in them
    the small matrix takes the whole step (Galerkin), and its SVD is cut. Small singular values do
    no harm, and nothing is integrated backwards.

    Shapes: m, n rows and columns, r rank of the SVD, R the most rank that is kept.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        change: [..., m, n] real floating, or `Factors` that stand for it: a step of a flow, as
            minus a learning rate times a gradient.
        tolerance: not negative, static or traced: the singular values that are cut have a
            Frobenius norm of at most this part of the whole.
        max_rank: static, R, at most min(m, n, 2 r). None: r.

    Returns:
        `IntegratedSVD` of an `SVD` of u [..., m, R], s [..., R], vt [..., R, n], zero beyond
        the rank kept, and that rank, at least 1.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit, or a max_rank out of its range.

    Cost: three products with the change and O((m + n) r²) flops.

    Accuracy: exact where a and a + change both have at most rank r and no direction of the one is
        orthogonal to all of the other. Otherwise of first order, with a constant that does not
        depend on the singular values.

    Source: Ceruti, Kusch, Lubich, "A rank-adaptive robust integrator for dynamical low-rank
        approximation", 2022.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([2.0, 0.0])), 1)
        >>> jlora.training.integrate_low_rank(svd, jnp.diag(jnp.array([1.0, 0.0]))).svd.s.round(4).tolist()
        [3.0]
    """
    u, s, vt = check_svd(svd)
    change = _check_change(change, u, vt, "change")
    limit = min(u.shape[-2], vt.shape[-1], 2 * s.shape[-1])
    max_rank = s.shape[-1] if max_rank is None else max_rank
    max_rank = _checks.check_integer(max_rank, "max_rank", maximum=limit)
    return _integrate(SVD(u, s, vt), change, tolerance, max_rank)


@functools.partial(jax.jit, static_argnames="max_rank")
def _integrate(svd, change, tolerance, max_rank):
    u, s, vt, *change = to_compute(*svd, *change)
    # Beside the old bases, K and L span no more than the products with the change.
    left, right = _multiply_right(change, vt), _multiply_left(change, u)
    rows, columns = _join_bases(u.mT, left.mT), _join_bases(vt, right)
    core = matmul(matmul(rows, u) * s[..., None, :], matmul(vt, columns.mT))
    core = core + matmul(_multiply_left(change, rows.mT), columns.mT)
    most = min(core.shape[-2:])
    noise = fixed_sketch(most, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, most, noise, is_reduced=False)
    # tail[k] is what a cut to rank k leaves.
    tail = jnp.sqrt(jnp.cumsum(s[..., ::-1] ** 2, axis=-1)[..., ::-1])
    allowed = jnp.asarray(tolerance, s.dtype) * frobenius_norm(core)[..., None]
    rank = jnp.sum(tail > allowed, axis=-1)
    rank = jnp.clip(rank, 1, max_rank).astype(jnp.int32)
    places = jnp.broadcast_to(
        jnp.arange(max_rank, dtype=jnp.int32), (*rank.shape, max_rank)
    )
    keep = places < rank[..., None]
    u = jnp.where(keep[..., None, :], matmul(rows.mT, e[..., :max_rank]), 0)
    vt = jnp.where(keep[..., None], matmul(f[..., :max_rank, :], columns), 0)
    kept = SVD(u, jnp.where(keep, s[..., :max_rank], 0), vt)
    return IntegratedSVD(mask_nonfinite(fix_signs(kept), is_finite(core)), rank)


def _join_bases(basis, change):
    """Return orthonormal rows that span those of both."""
    if basis.shape[-2] + change.shape[-2] >= basis.shape[-1]:
        whole = jnp.eye(basis.shape[-1], dtype=basis.dtype)
        return jnp.broadcast_to(whole, (*basis.shape[:-2], *whole.shape))
    return extend_basis(basis, change / power_of_two_scale(change))[0]


def _check_change(change, u, vt, name):
    """Return a dense change or its two factors as a tuple of arrays, checked."""
    expected = (*u.shape[:-1], vt.shape[-1])
    if isinstance(change, tuple):
        left, right = _checks.check_factors(change, name)
        shape = (*left.shape[:-1], right.shape[-1])
        _checks.check_shape(
            shape, expected, f"{name}.u @ {name}.v", "that of the svd's matrix"
        )
        return left, right
    change = _checks.check_matrix(change, name)
    _checks.check_shape(change.shape, expected, name, "that of the svd's matrix")
    return (change,)


def _multiply_right(change, vt):
    """Return change @ vtᵀ, [..., m, r]."""
    *left, last = change
    product = matmul(last, vt.mT)
    return matmul(left[0], product) if left else product


def _multiply_left(change, u):
    """Return uᵀ @ change, [..., r, n]."""
    first, *right = change
    product = matmul(u.mT, first)
    return matmul(product, right[0]) if right else product
