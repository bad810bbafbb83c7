"""The public decompositions: `randomized_svd` and `truncated_svd`."""

import functools

import jax

from jlora import _checks
from jlora._numerics import refuse_derivative
from jlora.factorization.core import decompose_fully
from jlora.factorization.iteration import iterate
from jlora.factorization.operators import solve_stored
from jlora.factorization.passes import plan_iteration
from jlora.factors import SVD, check_svd


def randomized_svd(
    a, rank, *, key, num_passes=None, block_size=None, method="krylov", warm_start=None
):
    """Return the leading `rank` singular triplets of each matrix, by random projection.

    Block Krylov: the span of aΩ, (aaᵀ)aΩ, (aaᵀ)²aΩ, ... for a Gaussian Ω of `block_size`
    columns, and the best approximation inside it. Subspace iteration keeps the last term alone.
    Where the basis would be as wide as the matrix, the full decomposition is computed instead:
    the same result, cheaper.

    Shapes: m, n rows and columns, r = rank, ... batch axes.

    Args:
        a: [..., m, n] real floating. float64 is computed in float64, all else in float32.
        rank: static, 1 ≤ rank ≤ min(m, n).
        key: one typed PRNG key, consumed. All matrices of a batch use the same test matrix;
            for a key each, vmap over both.
        num_passes: static, at least 2; products with a or aᵀ. None: 14 to 28 (krylov, see
            `plan_krylov`), 10 (subspace), 2 with `warm_start`. An odd count spends its first pass on
            a sketch through aᵀ.
        block_size: static, columns of one block. None: max(8, ⌈rank / 2⌉) (krylov; the rank
            from 17 to 64 where m and n are at least 3072), 2 rank (subspace), the rank of
            `warm_start` and 8 more.
        method: static, "krylov" or "subspace".
        warm_start: `SVD` of a matrix near `a`, of any rank: its leading vectors take the place of
            random ones. One pair of passes a step then follows a matrix that drifts.
            None: all random.

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype. NaN or Inf in a
        matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is no real floating array, `rank` no static integer, `key` no typed key,
            `warm_start` no SVD.
        ValueError: a size is out of its range, the basis has fewer columns than `rank`, or
            `warm_start` is of another shape than `a`.

    Cost: 2 m n block_size flops a pass, and about 6 (m + n) L² in all to keep the bases
        orthonormal, L = block_size * num_passes / 2 columns. Memory at most 3 (m + n) L numbers;
        never a copy of `a`, but for a 16-bit matrix on a CPU, which is widened there.

    Accuracy: u and v orthonormal to 1e-5 in float32 for any input. Singular values never exceed
        the true ones by more than rounding. The excess over the best possible error depends on
        the spectrum and is below 1e-4 on those of trained weights at the default setting.

    Gradients: refused with a TypeError when the derivative is asked for; unrolled iterations
        give wrong derivatives of singular vectors. Apply jax.lax.stop_gradient to `a`.

    Source: Musco and Musco 2015; Halko, Martinsson, Tropp 2011; see krylov.py, subspace.py.

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
    if width > min(a.shape[-2:]):
        return decompose_fully(refuse_derivative(a), rank)
    return _randomized_svd(
        refuse_derivative(a), key, warm_start, rank, num_passes, block_size, method
    )


def truncated_svd(a, rank):
    """Return the leading `rank` singular triplets of each matrix, to working precision.

    The full thin decomposition, cut: deterministic, and the oracle for everything faster.

    Shapes: m, n rows and columns, r = rank, ... batch axes.

    Args:
        a: [..., m, n] real floating. float64 is computed in float64, all else in float32.
        rank: static, 1 ≤ rank ≤ min(m, n).

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype. NaN or Inf in a
        matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is no real floating array, or `rank` no static integer.
        ValueError: `a` has fewer than two axes, or `rank` is outside [1, min(m, n)].

    Cost: O(m n min(m, n)) flops, the memory of a full thin decomposition.

    Accuracy: backward stable.

    Gradients: exact where the singular values are distinct and not zero; not finite elsewhere.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.truncated_svd(jnp.diag(jnp.array([3.0, 5.0, 1.0])), 2).s.round(4).tolist()
        [5.0, 3.0]
    """
    a = _checks.check_matrix(a)
    return decompose_fully(a, _checks.check_rank(rank, a.shape))


def _check_warm_start(warm_start, shape):
    if warm_start is None:
        return None
    u, s, vt = check_svd(warm_start, "warm_start")
    expected = (*shape[:-1], s.shape[-1])
    _checks.check_shape(u.shape, expected, "warm_start.u", "the rows of a, any rank")
    expected = (*shape[:-2], s.shape[-1], shape[-1])
    _checks.check_shape(
        vt.shape, expected, "warm_start.vt", "the columns of a, any rank"
    )
    return SVD(u, s, vt)


@functools.partial(
    jax.jit, static_argnames=("rank", "num_passes", "block_size", "method")
)
def _randomized_svd(a, key, warm_start, rank, num_passes, block_size, method):
    solve = functools.partial(
        iterate, rank=rank, num_passes=num_passes, block_size=block_size, method=method
    )
    return solve_stored(solve, a, key, warm_start)
