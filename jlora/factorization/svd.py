"""The public decompositions: `randomized_svd` and `truncated_svd`."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import compute_dtype, is_finite, matmul, power_of_two_scale, to_compute
from jlora.factorization.core import decompose_core
from jlora.factorization.krylov import krylov_factors
from jlora.factorization.products import multiply_transposed, solve_stored
from jlora.factorization.sketch import gaussian_sketch
from jlora.factorization.subspace import subspace_factors
from jlora.factors import SVD, check_svd

# Where the bulk of a matrix this large is cut, wide blocks and few passes cost less.
_LARGE = 3072
_PASSES_OF_RATIO = ((5, 16), (8, 20), (16, 22))  # min(m, n) over the rank, at most; passes
_SUBSPACE_PASSES = 10
_WARM_PASSES = 2
_WARM_OVERSAMPLING = 8


def randomized_svd(a, rank, *, key, num_passes=None, block_size=None, method="krylov",
                   start=None):  # fmt: skip
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
            `plan_krylov`), 10 (subspace), 2 with `start`. An odd count spends its first pass on
            a sketch through aᵀ.
        block_size: static, columns of one block. None: max(8, ⌈rank / 2⌉) (krylov; the rank
            from 17 to 64 where m and n are at least 3072), 2 rank (subspace), the rank of
            `start` and 8 more.
        method: static, "krylov" or "subspace".
        start: `SVD` of a matrix near `a`, of any rank: its leading vectors take the place of
            random ones. One pair of passes a step then follows a matrix that drifts.
            None: all random.

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype. NaN or Inf in a
        matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is no real floating array, `rank` no static integer, `key` no typed key,
            `start` no SVD.
        ValueError: a size is out of its range, the basis has fewer columns than `rank`, or
            `start` is of another shape than `a`.

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
    start = _check_start(start, a.shape)
    num_passes, block_size, width = plan_iteration(
        a.shape, rank, num_passes, block_size, method, start
    )
    if width > min(a.shape[-2:]):
        return decompose_fully(refuse_derivative(a), rank)
    return _randomized_svd(refuse_derivative(a), key, start, rank, num_passes, block_size, method)


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


def _check_start(start, shape):
    if start is None:
        return None
    u, s, vt = check_svd(start, "start")
    expected = (*shape[:-1], s.shape[-1])
    _checks.check_shape(u.shape, expected, "start.u", "the rows of a, any rank")
    expected = (*shape[:-2], s.shape[-1], shape[-1])
    _checks.check_shape(vt.shape, expected, "start.vt", "the columns of a, any rank")
    return SVD(u, s, vt)


def plan_iteration(shape, rank, num_passes=None, block_size=None, method="krylov", start=None):
    """Return (num_passes, block_size, rows that the widest basis has), defaults filled in."""
    limit = min(shape[-2:])
    if start is not None:
        default_passes, default_block = _WARM_PASSES, start.s.shape[-1] + _WARM_OVERSAMPLING
    elif method == "krylov":
        default_passes, default_block = plan_krylov(limit, rank)
    else:
        default_passes, default_block = _SUBSPACE_PASSES, 2 * rank
    given = num_passes is not None or block_size is not None
    num_passes = default_passes if num_passes is None else num_passes
    num_passes = _checks.check_integer(num_passes, "num_passes", minimum=2)
    num_blocks = num_passes // 2 if method == "krylov" else 1
    if block_size is None:
        # Few passes build few blocks: each has to be wider for the basis to hold the rank.
        block_size = min(limit, max(default_block, -(-rank // num_blocks)))
    block_size = _checks.check_integer(block_size, "block_size", maximum=limit)
    width = block_size * num_blocks
    if given and width < rank:
        raise ValueError(
            f"`block_size` must give a basis of at least rank = {rank} columns, got {width} "
            f"(block_size {block_size}, num_passes {num_passes}, method {method!r}). Raise one."
        )
    # Krylov keeps one right block more than left ones.
    return num_passes, block_size, width + (block_size if method == "krylov" else 0)


def plan_krylov(limit, rank):
    """Return the default (num_passes, block_size) for matrices of limit = min(m, n).

    The fewest passes that leave an excess error of at most 1e-4 on the slowest of the spectra in
    benchmarks/results, "choice of passes": spiked, flat and pretrained, over several seeds. At
    rank 16 of a large matrix a few more, since there subspace iteration comes as near too.
    """
    half = max(8, -(-rank // 2))
    if rank <= 16:
        return (14 if rank <= 8 else 22 if limit < 2048 else 26), half
    if limit < _LARGE:
        # A basis that holds a good part of the whole space needs fewer.
        for ratio, num_passes in _PASSES_OF_RATIO:
            if limit <= ratio * rank:
                return num_passes, half
        return (22 if rank >= 128 else 26), half
    return (18, rank) if rank <= 64 else (28, half)


@functools.partial(jax.jit, static_argnames="rank")
def decompose_fully(a, rank):
    """Return the full decomposition cut to `rank`."""
    a = to_compute(a)
    scale = power_of_two_scale(a)
    finite = is_finite(a)
    # LAPACK may loop or fail on NaN; it gets zeros, and the answer is made NaN afterwards.
    u, s, vt = jnp.linalg.svd(jnp.where(finite, a / scale, 0), full_matrices=False)
    svd = SVD(u[..., :rank], s[..., :rank] * scale[..., 0], vt[..., :rank, :])
    return poison(svd, finite)


@functools.partial(jax.jit, static_argnames=("rank", "num_passes", "block_size", "method"))
def _randomized_svd(a, key, start, rank, num_passes, block_size, method):
    solve = functools.partial(iterate, rank=rank, num_passes=num_passes,
                              block_size=block_size, method=method)  # fmt: skip
    return solve_stored(solve, a, key, start)


def iterate(a, key, start, rank, num_passes, block_size, method="krylov"):
    """Return the SVD of a matrix, or of an `ImplicitProduct`, for sizes of `plan_iteration`."""
    sketch_key, basis_key, core_key = jax.random.split(key, 3)
    omega = _make_omega(a, sketch_key, start, block_size, is_odd=num_passes % 2 == 1)
    build = krylov_factors if method == "krylov" else subspace_factors
    left, core, right = build(a, omega, num_passes // 2, key=basis_key)
    noise = gaussian_sketch(core_key, rank, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, rank, noise)
    svd = SVD(matmul(e.mT, left).mT, s, matmul(f, right))
    # A number that is not finite in a reaches every coefficient; looking at a itself costs a pass.
    return poison(svd, is_finite(core))


def _make_omega(a, key, start, block_size, *, is_odd):
    """Return the first right block: the start's vectors, then random ones.

    [b, n] where it is random alone, the same for all of a batch; else [..., b, n].
    """
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    dtype = compute_dtype(a.dtype)
    rows = gaussian_sketch(key, block_size, m if is_odd else n, dtype)
    if start is not None or is_odd:
        rows = jnp.broadcast_to(rows, (*batch, *rows.shape))
    if start is not None:
        known = (start.u.mT if is_odd else start.vt)[..., :block_size, :].astype(dtype)
        rows = jnp.concatenate([known, rows[..., known.shape[-2] :, :]], axis=-2)
    return multiply_transposed(a, rows) if is_odd else rows


def poison(svd, finite):
    """Return the SVD with NaN for each matrix that is not `finite` [..., 1, 1]."""
    nan = jnp.asarray(jnp.nan, svd.s.dtype)
    return SVD(
        jnp.where(finite, svd.u, nan),
        jnp.where(finite[..., 0], svd.s, nan),
        jnp.where(finite, svd.vt, nan),
    )


@jax.custom_jvp
def refuse_derivative(a):
    """Return `a`; a derivative with respect to it is refused when it is asked for."""
    return a


@refuse_derivative.defjvp
def _raise_refusal(primals, tangents):
    raise TypeError(
        "`a` must not be differentiated by a randomised method, got a derivative request. "
        "Apply jax.lax.stop_gradient to it, or use low_rank_approximation or truncated_svd."
    )
