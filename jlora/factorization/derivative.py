"""The derivative of the truncated SVD of a product of thin factors.

The derivative is a formula in the singular vectors. It does not differentiate the
algorithm that computed them, which orthonormalises rows that may be dependent.

Source: Townsend, "Differentiating the singular value decomposition", 2016. Differs: for
truncated decompositions, whose discarded triplets enter the formula too.
"""

from __future__ import annotations

import jax.numpy as jnp

from jlora._numerics import matmul
from jlora._types import Array, Bool, Float
from jlora.factors import SVD

# Singular values, or differences of them, below this many eps σ₁ are rounding.
_LEAST_DIFFERENCE = 10


def differentiate_product(
    svd: SVD,
    rank: int,
    left: Float[Array, "*batch m k"],
    right: Float[Array, "*batch k n"],
    d_left: Float[Array, "*batch m k"],
    d_right: Float[Array, "*batch k n"],
) -> SVD:
    """Return the tangent of the SVD of left @ right, truncated to `rank`.

    Args:
        svd: all min(m, n, k) triplets of the product.
        rank: static, the number of triplets whose tangent is asked for.
        left, right: the factors of the matrix.
        d_left, d_right: their tangents.
    """
    u, v = svd.u, svd.vt.mT
    # dA v and dAᵀ u for A = left @ right.
    da_v = matmul(d_left, matmul(right, v)) + matmul(left, matmul(d_right, v))
    da_t_u = matmul(d_right.mT, matmul(left.mT, u))
    da_t_u = da_t_u + matmul(right.mT, matmul(d_left.mT, u))
    return differentiate_svd(svd, rank, da_v, da_t_u)


def differentiate_svd(
    svd: SVD,
    rank: int,
    da_v: Float[Array, "*batch m q"],
    da_t_u: Float[Array, "*batch n q"],
) -> SVD:
    """Return the tangent of the leading `rank` triplets of a matrix of rank q.

    With P = uᵀ dA v, the vectors rotate among all q triplets by

        Ωᵢⱼ = (Pᵢⱼ σⱼ + σᵢ Pⱼᵢ) / (σⱼ² − σᵢ²),  Ψᵢⱼ = (σᵢ Pᵢⱼ + Pⱼᵢ σⱼ) / (σⱼ² − σᵢ²),

    and out of their span by dA vⱼ / σⱼ and dAᵀ uⱼ / σⱼ. The tangent of a vector is NaN
    where its singular value is zero or repeated, up to rounding.

    Args:
        svd: all q triplets; the matrix has no others.
        rank: static, the number of triplets whose tangent is asked for.
        da_v: dA v.
        da_t_u: dAᵀ u.
    """
    u, s, v = svd.u, svd.s, svd.vt.mT
    kept = s[..., None, :rank]
    inside = matmul(u.mT, da_v)  # P
    is_smooth = _find_smooth(s, rank)

    # Rotations among the triplets: row i, column j ≤ rank.
    own = _mark_own(s, rank)
    difference = (kept - s[..., None]) * (kept + s[..., None])
    inverse = jnp.where(own, 0, 1) / jnp.where(own | ~is_smooth, 1, difference)
    forward = inside[..., :rank]  # Pᵢⱼ
    backward = inside.mT[..., :rank]  # Pⱼᵢ
    omega = inverse * (forward * kept + s[..., None] * backward)
    psi = inverse * (s[..., None] * forward + backward * kept)

    # Rotations out of their span. NaN reaches the transpose too: it is a factor.
    reciprocal = jnp.where(is_smooth, 1, jnp.nan) / jnp.where(is_smooth, kept, 1)
    outside_u = da_v[..., :rank] - matmul(u, forward)
    outside_v = da_t_u[..., :rank] - matmul(v, matmul(v.mT, da_t_u[..., :rank]))
    du = matmul(u, omega) + outside_u * reciprocal
    dv = matmul(v, psi) + outside_v * reciprocal

    ds = jnp.sum(jnp.where(own, forward, 0), axis=-2)
    return SVD(du, ds, dv.mT)


def _find_smooth(s: Float[Array, "*batch q"], rank: int) -> Bool[Array, "*batch 1 k"]:
    """Return which of the leading `rank` values are neither zero nor repeated."""
    least = _LEAST_DIFFERENCE * jnp.finfo(s.dtype).eps * s[..., None, :1]
    kept = s[..., None, :rank]
    distance = jnp.abs(kept - s[..., None])
    is_other = ~_mark_own(s, rank)
    is_repeated = jnp.any((distance <= least) & is_other, axis=-2, keepdims=True)
    return (kept > least) & ~is_repeated


def _mark_own(s: Float[Array, "*batch q"], rank: int) -> Bool[Array, "*batch q k"]:
    """Return which pairs of triplets i, j ≤ rank are one triplet."""
    eye = jnp.eye(s.shape[-1], rank, dtype=bool)
    return jnp.broadcast_to(eye, (*s.shape[:-1], *eye.shape))
