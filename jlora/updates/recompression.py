"""Products of factors concatenated, recompressed, balanced, orthogonalised."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    refuse_derivative,
    times_power_of_two,
    to_compute,
)
from jlora._sharding import follow_axes
from jlora._types import Array, Float, PRNGKey, Scalar
from jlora.factorization.iteration import decompose_randomly
from jlora.factorization.operators import ImplicitProduct
from jlora.factorization.passes import plan_iteration
from jlora.factors import (
    NEW_SVD_AXES,
    SVD,
    Factors,
    fix_signs,
    pad_rank,
)
from jlora.updates.products import (
    balance_product,
    decompose_product,
    decompose_scaled,
    equilibrate,
    find_rank_limit,
)


def concatenate_factors(
    factors: Sequence[Factors], weights: Sequence[Scalar] | Array | None = None
) -> Factors:
    """Return factors of Σ wᵢ uᵢ vᵢ: several adapters as one, exactly.

    The ranks add up: side by side the factors stand for the sum of the products. A sum
    of the factors would add the cross terms uᵢ vⱼ.

    Args:
        factors: a sequence of `Factors` of u [..., m, kᵢ], v [..., kᵢ, n].
        weights: one number for each, static or traced, or an array of them. None: ones.

    Returns:
        `Factors` of u [..., m, k], v [..., k, n] in the common compute dtype; the
        weights are on u.

    Raises:
        TypeError: an entry that is no pair of factors.
        ValueError: no entry at all, sizes that differ, or another number of weights.

    Cost: a copy of the factors.

    Gradients: exact, to the factors and to the weights.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> one = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> both = jlora.concatenate_factors([one, one], [1.0, 0.5])
        >>> both.u.shape, jlora.reconstruct(both)[0].tolist()
        ((3, 2), [1.5, 1.5])
    """
    pairs = _checks.check_pairs(factors)
    weights = [1.0] * len(pairs) if weights is None else _list_weights(weights)
    if len(weights) != len(pairs):
        raise ValueError(
            f"`weights` must hold one number for each of {len(pairs)} factors, "
            f"got {len(weights)}. Leave it out for a plain sum."
        )

    arrays = to_compute(*(array for pair in pairs for array in pair))
    us = [
        u * jnp.asarray(weight, u.dtype)
        for weight, u in zip(weights, arrays[::2], strict=True)
    ]
    u = jnp.concatenate(us, axis=-1)
    return Factors(u, jnp.concatenate(arrays[1::2], axis=-2))


def _list_weights(weights: Any) -> list[Scalar]:
    """Return `weights` as a list of numbers."""
    is_array = hasattr(weights, "shape") and hasattr(weights, "dtype")
    if not (len(weights.shape) == 1 if is_array else isinstance(weights, Sequence)):
        got = f"shape {weights.shape}" if is_array else type(weights).__name__
        raise TypeError(
            f"`weights` must be a sequence of numbers or an array [k], got {got}. "
            "Pass one number for each of the factors."
        )
    return [
        _checks.check_scalar(weight, f"weights[{i}]")
        for i, weight in enumerate(weights)
    ]


def recompress(factors: Factors, rank: int, *, key: PRNGKey | None = None) -> SVD:
    """Return the SVD of u @ v truncated to `rank`: its best approximation.

    With u = q₁ r₁ and vᵀ = q₂ r₂, u v = q₁ (r₁ r₂ᵀ) q₂ᵀ, and the small matrix in the
    middle has all the singular values. With a key it runs block Krylov on the product,
    multiplied factor by factor, which is much cheaper if the factors have many times
    the rank that is kept.

    Args:
        factors: `Factors` of u [..., m, k], v [..., k, n].
        rank: static, 1 ≤ rank ≤ min(m, n, k).
        key: one typed PRNG key, consumed, for the randomised method. It is used only if
            its basis, about 12 rank wide, is narrower than k. None: the exact method.

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype, signs
        as by `fix_signs`. NaN or Inf in a factor gives NaN for that product.

    Raises:
        TypeError: factors, rank or key of the wrong kind.
        ValueError: shapes that do not fit, or `rank` out of its range.

    Cost: O((m + n) k² + k³) flops, memory O((m + n) k); with a key O((m + n) k r)
        flops. Never an m×n array.

    Accuracy: exact for factors that differ from the given ones by rounding, also for
        dependent columns. With a key as `randomized_svd`.

    Gradients: exact where the singular values kept are distinct and nonzero; NaN for
        the vectors of the others. Refused with a key.

    Example:
        >>> import jax, jlora
        >>> u = jax.random.normal(jax.random.key(0), (50, 8))
        >>> svd = jlora.recompress(jlora.Factors(u, u.T), 3)
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((50, 3), (3,), (3, 50))
    """
    u, v = _checks.check_factors(factors)
    rank = _checks.check_integer(rank, "rank", maximum=find_rank_limit(u, v))
    if key is None:
        return decompose_product(u, v, rank)
    _checks.check_key(key)
    num_passes, block_size, width = plan_iteration((u.shape[-2], v.shape[-1]), rank)
    if width >= find_rank_limit(u, v):
        return decompose_product(u, v, rank)
    return _recompress_randomly(
        refuse_derivative(u), refuse_derivative(v), key, rank, num_passes, block_size
    )


def balance(factors: Factors) -> Factors:
    """Return factors of the same product with uᵀu = v vᵀ, diagonal and descending.

    Both sides then have the same norm, which suits a common learning rate.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].

    Returns:
        `Factors` of the same shapes in the compute dtype. Columns beyond min(m, n) are
        zero.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: as `recompress` at full rank.

    Gradients: as `recompress`; not finite where the product has a lower rank than r.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((4, 1), 8.0), jnp.full((1, 4), 2.0))
        >>> u, v = jlora.updates.balance(factors)
        >>> round(float((u.T @ u)[0, 0]), 3), round(float((v @ v.T)[0, 0]), 3)
        (64.0, 64.0)
    """
    u, v = _checks.check_factors(factors)
    rank, kept = u.shape[-1], find_rank_limit(u, v)
    return pad_rank(balance_product(u, v, kept), rank)


def orthogonalize_product(factors: Factors) -> Factors:
    """Return factors of the polar factor of u @ v: all its singular values become one.

    u v = q₁ c q₂ᵀ with a small c, and the polar factor of the product is q₁ polar(c)
    q₂ᵀ. This is Muon's step on a dense gradient, without the m×n array. Singular values
    of at most 10 eps √k of the largest become zero, because they have no direction to
    keep.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].

    Returns:
        `Factors` of the same shapes in the compute dtype: u has orthonormal columns and
        v orthonormal rows, zero where the product has no further singular value.

    Raises:
        TypeError: factors of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: as `recompress` at full rank.

    Gradients: as `recompress`.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks",
        2024. Differs: exact, by the SVD of the small matrix.

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
    rank, kept = u.shape[-1], find_rank_limit(u, v)
    left, s, right = decompose_scaled(u, v, kept).svd
    threshold = 10 * jnp.finfo(s.dtype).eps * kept**0.5 * s[..., :1]
    # NaN is not below the threshold, so it stays NaN.
    is_small = (s <= threshold)[..., None]
    u, v = jnp.where(is_small.mT, 0, left), jnp.where(is_small, 0, right)
    return pad_rank(Factors(u, v), rank)


@functools.partial(jax.jit, static_argnames=("rank", "num_passes", "block_size"))
@follow_axes("*b m k", "*b k n", None, result=NEW_SVD_AXES)
def _recompress_randomly(
    u: Float[Array, "*batch m k"],
    v: Float[Array, "*batch k n"],
    key: PRNGKey,
    rank: int,
    num_passes: int,
    block_size: int,
) -> SVD:
    product = equilibrate(*to_compute(u, v))
    weight = times_power_of_two(jnp.ones((), product.u.dtype), product.exponents)
    operator = ImplicitProduct(product.u * weight.mT, product.v)
    svd = decompose_randomly(operator, key, None, rank, num_passes, block_size)
    s = times_power_of_two(svd.s, product.exponent[..., 0])
    return fix_signs(svd._replace(s=s))
