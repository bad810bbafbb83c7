"""The public decompositions of a given rank: `randomized_svd` and `truncated_svd`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import jax

from jlora import _checks
from jlora._numerics import refuse_derivative
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, PRNGKey
from jlora.factorization.full import decompose_fully
from jlora.factorization.iteration import decompose_randomly
from jlora.factorization.operators import solve_stored
from jlora.factorization.passes import plan_iteration
from jlora.factors import NEW_SVD_AXES, SVD, SVD_AXES, check_svd


def randomized_svd(
    a: Float[AnyArray, "*batch m n"],
    rank: int,
    *,
    key: PRNGKey,
    num_passes: int | None = None,
    block_size: int | None = None,
    method: Literal["krylov", "subspace"] = "krylov",
    warm_start: SVD | None = None,
) -> SVD:
    """Return the leading `rank` singular triplets of each matrix, by random projection.

    Block Krylov: the best approximation inside the span of aΩ, (aaᵀ)aΩ, (aaᵀ)²aΩ, ...,
    where Ω is Gaussian with `block_size` columns. Subspace iteration keeps only the
    last of these blocks. If the basis would be as wide as the matrix, the full
    decomposition is computed instead: it is at least as exact, and cheaper.

    Args:
        a: real floating. float64 is computed in float64, every other dtype in float32.
        rank: static, 1 ≤ rank ≤ min(m, n).
        key: one typed PRNG key, consumed. The matrices of a batch share one test
            matrix. For one key per matrix, use vmap over both.
        num_passes: static, at least 2: the number of products with a or aᵀ. None: 14 to
            28 for "krylov" (see `plan_krylov`), 10 for "subspace", 2 with `warm_start`.
            An odd number spends its first pass on a sketch through aᵀ.
        block_size: static, the number of columns of one block. None:
            max(8, ⌈rank / 2⌉) for "krylov", but `rank` if it is 17 to 64 and m and n
            are at least 3072; 2 rank for "subspace"; the rank of `warm_start` plus 8.
        method: static, "krylov" or "subspace".
        warm_start: the SVD of a matrix near `a`, of any rank. Its leading vectors
            replace random ones, so one pair of passes per step follows a matrix that
            drifts. None: all vectors are random.

    Returns:
        `SVD` of u [..., m, rank], s [..., rank], vt [..., rank, n] in the compute
        dtype. NaN or Inf in a matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is not a real floating array, `rank` not a static integer, `key`
            not a typed key, or `warm_start` not an SVD.
        ValueError: a size is out of range, the basis has fewer columns than `rank`, or
            the shape of `warm_start` does not fit `a`.

    Cost: 2 m n block_size flops per pass, and about 6 (m + n) L² in total to keep the
        bases orthonormal, with L = block_size * num_passes / 2 columns. Memory for at
        most 3 (m + n) L elements. `a` is never copied, except that a CPU casts a 16-bit
        matrix to float32.

    Accuracy: u and v are orthonormal to 1e-5 in float32 for any input. Singular values
        exceed the true ones by rounding at most. The excess over the best possible
        error depends on the spectrum. It is below 1e-4 for trained weights at the
        defaults.

    Gradients: refused with a TypeError when a derivative is requested, because unrolled
        iterations give wrong derivatives of singular vectors. Apply
        jax.lax.stop_gradient to `a`.

    Source: Musco and Musco 2015; Halko, Martinsson, Tropp 2011; see krylov.py and
        subspace.py.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (300, 200))
        >>> svd = jlora.randomized_svd(a, 4, key=jax.random.key(1))
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((300, 4), (4,), (4, 200))
        >>> exact = jlora.truncated_svd(a, 4)
        >>> bool(abs(svd.s - exact.s).max() < 1e-3 * exact.s[0])
        True
    """
    a = _checks.check_matrix(a)
    rank = _checks.check_rank(rank, a.shape)
    _checks.check_key(key)
    _checks.check_choice(method, ("krylov", "subspace"), "method")
    warm_start = _check_warm_start(warm_start, a.shape)
    num_passes, block_size, width = plan_iteration(
        a.shape, rank, num_passes, block_size, method, warm_start
    )

    a = refuse_derivative(a)
    if width > min(a.shape[-2:]):
        return decompose_fully(a, rank)
    return _randomized_svd(a, key, warm_start, rank, num_passes, block_size, method)


def truncated_svd(a: Float[AnyArray, "*batch m n"], rank: int) -> SVD:
    """Return the leading `rank` singular triplets of each matrix, to working precision.

    The full thin decomposition, truncated. It is deterministic, and the reference for
    every faster method.

    Args:
        a: real floating. float64 is computed in float64, every other dtype in float32.
        rank: static, 1 ≤ rank ≤ min(m, n).

    Returns:
        `SVD` of u [..., m, rank], s [..., rank], vt [..., rank, n] in the compute
        dtype. NaN or Inf in a matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is not a real floating array, or `rank` not a static integer.
        ValueError: `a` has fewer than two axes, or `rank` is outside [1, min(m, n)].

    Cost: O(m n min(m, n)) flops, and the memory of a full thin decomposition.

    Accuracy: backward stable.

    Gradients: exact where the singular values are distinct and nonzero; elsewhere not
        finite.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> a = jnp.diag(jnp.array([3.0, 5.0, 1.0]))
        >>> jlora.truncated_svd(a, 2).s.round(4).tolist()
        [5.0, 3.0]
    """
    a = _checks.check_matrix(a)
    return decompose_fully(a, _checks.check_rank(rank, a.shape))


def _check_warm_start(warm_start: SVD | None, shape: Sequence[int]) -> SVD | None:
    """Return `warm_start` with JAX arrays, after a check that it fits `shape`."""
    if warm_start is None:
        return None
    u, s, vt = check_svd(warm_start, "warm_start")
    *batch, m, n = shape
    rank = s.shape[-1]

    expected = (*batch, m, rank)
    _checks.check_shape(u.shape, expected, "warm_start.u", "the rows of a, any rank")
    expected, meaning = (*batch, rank, n), "the columns of a, any rank"
    _checks.check_shape(vt.shape, expected, "warm_start.vt", meaning)
    return SVD(u, s, vt)


@functools.partial(
    jax.jit, static_argnames=("rank", "num_passes", "block_size", "method")
)
@follow_axes("*b m n", None, SVD_AXES, result=NEW_SVD_AXES)
def _randomized_svd(
    a: Float[Array, "*batch m n"],
    key: PRNGKey,
    warm_start: SVD | None,
    rank: int,
    num_passes: int,
    block_size: int,
    method: str,
) -> SVD:
    decompose = functools.partial(
        decompose_randomly,
        rank=rank,
        num_passes=num_passes,
        block_size=block_size,
        method=method,
    )
    return solve_stored(decompose, a, key, warm_start)
