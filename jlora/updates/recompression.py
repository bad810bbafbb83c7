"""Products of factors, joined, recompressed, balanced or orthogonalised, never formed."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    is_finite,
    matmul,
    power_of_two_scale,
    refuse_derivative,
    to_compute,
)
from jlora.factorization.core import decompose_core
from jlora.factorization.iteration import iterate
from jlora.factorization.operators import ImplicitProduct
from jlora.factorization.orthonormal import orthonormalize
from jlora.factorization.passes import plan_iteration
from jlora.factorization.sketch import fixed_sketch
from jlora.factors import SVD, Factors, fix_signs, mask_nonfinite, pad_rank, split_svd


def concatenate_factors(factors, weights=None):
    """Return factors of Σ wᵢ uᵢ vᵢ: several adapters as one, exactly, their ranks added up.

    Side by side the factors make the sum of the products. The sum of the factors would not: it
    also has the cross terms uᵢ vⱼ.

    Shapes: m, n rows and columns of every product, kᵢ their ranks, k the sum of these.

    Args:
        factors: a sequence of `Factors` of u [..., m, kᵢ], v [..., kᵢ, n].
        weights: one number for each, Python's or traced, or one array of them. None: ones.

    Returns:
        `Factors` of u [..., m, k], v [..., k, n] in the common compute dtype; the weights are
        on u.

    Raises:
        TypeError: an entry that is no pair of factors.
        ValueError: no entry at all, sizes that differ, or another number of weights.

    Cost: that of copying the factors.

    Gradients: exact, to the factors and to the weights.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> one = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> both = jlora.concatenate_factors([one, one], [1.0, 0.5])
        >>> both.u.shape, jlora.reconstruct(both)[0].tolist()
        ((3, 2), [1.5, 1.5])
    """
    pairs = _checks.check_pairs(factors)
    weights = [1.0] * len(pairs) if weights is None else list(weights)
    if len(weights) != len(pairs):
        raise ValueError(
            f"`weights` must hold one number for each of {len(pairs)} factors, "
            f"got {len(weights)}. Leave it out for a plain sum."
        )
    parts = to_compute(*(part for pair in pairs for part in pair))
    us = [
        u * jnp.asarray(weight, u.dtype)
        for weight, u in zip(weights, parts[::2], strict=True)
    ]
    return Factors(jnp.concatenate(us, axis=-1), jnp.concatenate(parts[1::2], axis=-2))


def recompress(factors, rank, *, key=None):
    """Return the SVD of u @ v cut to `rank`: its best approximation of that rank.

    u = q₁ r₁ and vᵀ = q₂ r₂, so u v = q₁ (r₁ r₂ᵀ) q₂ᵀ, and the small matrix in the middle has
    all the singular values. With a key, block Krylov on the product, multiplied factor by
    factor: much cheaper where the rank of the factors is many times the one kept.

    Shapes: m, n rows and columns of u @ v, k the rank of the factors, r = rank.

    Args:
        factors: `Factors` of u [..., m, k], v [..., k, n].
        rank: static, 1 ≤ rank ≤ min(m, n, k).
        key: one typed PRNG key, consumed, for the randomised way; it is gone only where its
            basis is narrower than k, about 12 rank. None: the exact way.

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype, signs as by
        `fix_signs`. NaN or Inf in a factor gives NaN for that product.

    Raises:
        TypeError: factors, rank or key of the wrong kind.
        ValueError: shapes that do not fit, or `rank` out of its range.

    Cost: O((m + n) k² + k³) flops, memory O((m + n) k); with a key O((m + n) k r) flops. Never
        an m×n array.

    Accuracy: exact for factors that differ from the given ones by rounding, however dependent
        their columns are. With a key that of `randomized_svd`.

    Gradients: exact where the singular values kept are distinct, k ≤ min(m, n), and the factors
        have full rank. Refused with a key.

    Example:
        >>> import jax, jlora
        >>> u = jax.random.normal(jax.random.key(0), (50, 8))
        >>> svd = jlora.recompress(jlora.Factors(u, u.T), 3)
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((50, 3), (3,), (3, 50))
    """
    u, v = _checks.check_factors(factors)
    rank = _checks.check_integer(rank, "rank", maximum=_find_limit(u, v))
    if key is None:
        return decompose_product(u, v, rank)
    _checks.check_key(key)
    num_passes, block_size, width = plan_iteration((u.shape[-2], v.shape[-1]), rank)
    if width >= _find_limit(u, v):
        return decompose_product(u, v, rank)
    return _recompress_randomly(
        refuse_derivative(u), refuse_derivative(v), key, rank, num_passes, block_size
    )


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
        >>> u, v = jlora.updates.balance(factors)
        >>> round(float((u.T @ u)[0, 0]), 3), round(float((v @ v.T)[0, 0]), 3)
        (64.0, 64.0)
    """
    u, v = _checks.check_factors(factors)
    rank, kept = u.shape[-1], _find_limit(u, v)
    return pad_rank(split_svd(decompose_product(u, v, kept)), rank)


def orthogonalize_product(factors):
    """Return factors of the polar factor of u @ v: its singular values made one.

    u v = q₁ c q₂ᵀ with a small c, and the polar factor of the product is q₁ polar(c) q₂ᵀ: what
    Muon's step does to a dense gradient, without the m×n array. Singular values of at most
    10 eps √k of the largest are made zero: there is no direction to keep.

    Shapes: m, n rows and columns of u @ v, r the rank of the factors.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].

    Returns:
        `Factors` of the same shapes in the compute dtype: u has orthonormal columns and v
        orthonormal rows, zero where the product has no further singular value.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: that of `recompress` at full rank.

    Gradients: as `recompress`.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
        Differs: exact, by the SVD of the small matrix.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> keys = jax.random.split(jax.random.key(0))
        >>> factors = jlora.Factors(jax.random.normal(keys[0], (9, 2)),
        ...                         jax.random.normal(keys[1], (2, 7)))
        >>> polar = jlora.reconstruct(jlora.updates.orthogonalize_product(factors))
        >>> jnp.linalg.svd(polar, compute_uv=False)[:3].round(3).tolist()
        [1.0, 1.0, 0.0]
    """
    u, v = _checks.check_factors(factors)
    rank, kept = u.shape[-1], _find_limit(u, v)
    left, s, right = decompose_product(u, v, kept)
    least = 10 * jnp.finfo(s.dtype).eps * kept**0.5 * s[..., :1]
    # NaN is not below anything, and stays.
    gone = (s <= least)[..., None]
    return pad_rank(
        Factors(jnp.where(gone.mT, 0, left), jnp.where(gone, 0, right)), rank
    )


def _find_limit(u, v):
    return min(u.shape[-2], v.shape[-1], u.shape[-1])


@functools.partial(jax.jit, static_argnames=("rank", "num_passes", "block_size"))
def _recompress_randomly(u, v, key, rank, num_passes, block_size):
    u, v = to_compute(u, v)
    scale_u, scale_v = power_of_two_scale(u), power_of_two_scale(v)
    product = ImplicitProduct(u / scale_u, v / scale_v)
    svd = iterate(product, key, None, rank, num_passes, block_size)
    return fix_signs(svd._replace(s=svd.s * scale_u[..., 0] * scale_v[..., 0]))


@functools.partial(jax.jit, static_argnames="rank")
def decompose_product(u, v, rank):
    """Return the SVD of u @ v cut to `rank`, for u [..., m, k], v [..., k, n]."""
    u, v = to_compute(u, v)
    scale_u, scale_v = power_of_two_scale(u), power_of_two_scale(v)
    left, part_u = _find_basis(u.mT / scale_u)
    right, part_v = _find_basis(v / scale_v)
    core = matmul(part_u.mT, part_v)
    noise = fixed_sketch(rank, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, rank, noise, is_reduced=False)
    svd = SVD(
        e if left is None else matmul(e.mT, left).mT,
        s * scale_u[..., 0] * scale_v[..., 0],
        f if right is None else matmul(f, right),
    )
    return mask_nonfinite(fix_signs(svd), is_finite(core))


def _find_basis(rows):
    """Return (basis, part) with rows [..., k, m] = part @ basis; no basis where k ≥ m."""
    num_rows, size = rows.shape[-2:]
    if num_rows >= size:
        return None, rows
    basis = orthonormalize(rows, fixed_sketch(num_rows, size, rows.dtype))
    return basis, matmul(rows, basis.mT)
