"""Recompression of a product of factors, never forming it."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import matmul, power_of_two_scale, to_compute
from jlora.factors import SVD, Factors, split_svd


def recompress(factors, rank):
    """Return the SVD of u @ v cut to `rank`: its best approximation of that rank.

    u = q₁ r₁ and vᵀ = q₂ r₂, so u v = q₁ (r₁ r₂ᵀ) q₂ᵀ, and the small matrix in the middle has
    all the singular values.

    Shapes: m, n rows and columns of u @ v, k the rank of the factors, r = rank.

    Args:
        factors: `Factors` of u [..., m, k], v [..., k, n].
        rank: static, 1 ≤ rank ≤ min(m, n, k).

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype.

    Raises:
        TypeError: factors or rank of the wrong kind.
        ValueError: shapes that do not fit, or `rank` out of its range.

    Cost: O((m + n) k² + k³) flops, memory O((m + n) k); never an m×n array.

    Accuracy: backward stable in each factor, however dependent their columns are.

    Gradients: exact where the singular values kept are distinct and k ≤ min(m, n).

    Example:
        >>> import jax, jlora
        >>> u = jax.random.normal(jax.random.key(0), (50, 8))
        >>> svd = jlora.recompress(jlora.Factors(u, u.T), 3)
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((50, 3), (3,), (3, 50))
    """
    u, v = _checks.check_factors(factors)
    limit = min(u.shape[-2], v.shape[-1], u.shape[-1])
    rank = _checks.check_integer(rank, "rank", maximum=limit)
    return _recompress(u, v, rank)


def balance(factors):
    """Return factors of the same product with uᵀu = v vᵀ, diagonal and descending.

    The two sides then carry the same norm, which a common learning rate wants.

    Shapes: m, n rows and columns of u @ v, r the rank of the factors.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].

    Returns:
        `Factors` of the same shapes in the compute dtype. Columns beyond min(m, n) are zero.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: that of `recompress` at full rank.

    Gradients: as `recompress`; not finite where the product has a lower rank than r.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((4, 1), 8.0), jnp.full((1, 4), 2.0))
        >>> u, v = jlora.balance(factors)
        >>> round(float((u.T @ u)[0, 0]), 3), round(float((v @ v.T)[0, 0]), 3)
        (64.0, 64.0)
    """
    u, v = _checks.check_factors(factors)
    rank = u.shape[-1]
    kept = min(u.shape[-2], v.shape[-1], rank)
    u, v = split_svd(_recompress(u, v, kept))
    no_padding = [(0, 0)] * (u.ndim - 2)
    return Factors(
        jnp.pad(u, [*no_padding, (0, 0), (0, rank - kept)]),
        jnp.pad(v, [*no_padding, (0, rank - kept), (0, 0)]),
    )


@functools.partial(jax.jit, static_argnames="rank")
def _recompress(u, v, rank):
    u, v = to_compute(u, v)
    scale_u, scale_v = power_of_two_scale(u), power_of_two_scale(v)
    q_u, r_u = jnp.linalg.qr(u / scale_u)
    q_v, r_v = jnp.linalg.qr((v / scale_v).mT)
    core = matmul(r_u, r_v.mT)
    left, s, right = jnp.linalg.svd(core, full_matrices=False)
    s = s[..., :rank] * scale_u[..., 0] * scale_v[..., 0]
    return SVD(matmul(q_u, left[..., :rank]), s, matmul(right[..., :rank, :], q_v.mT))
