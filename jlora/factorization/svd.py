"""The public decompositions: `randomized_svd` and `truncated_svd`."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import matmul, power_of_two_scale, to_compute
from jlora.factorization.krylov import decompose_captured, krylov_basis
from jlora.factorization.sketch import gaussian_sketch
from jlora.factorization.subspace import subspace_basis
from jlora.factors import SVD

_KRYLOV_PASSES = 24
_SUBSPACE_PASSES = 10


def randomized_svd(a, rank, *, key, num_passes=None, block_size=None, method="krylov"):
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
        num_passes: static, at least 2; products with a or aᵀ. None: 24 (krylov), 10 (subspace).
            An odd count spends its first pass on a sketch through aᵀ.
        block_size: static, columns of one block. None: max(8, ⌈rank / 2⌉) (krylov),
            2 rank (subspace).
        method: static, "krylov" or "subspace".

    Returns:
        `SVD` of u [..., m, r], s [..., r], vt [..., r, n] in the compute dtype. NaN or Inf in a
        matrix gives NaN for that matrix.

    Raises:
        TypeError: `a` is no real floating array, `rank` no static integer, `key` no typed key.
        ValueError: a size is out of its range, or the basis has fewer columns than `rank`.

    Cost: 2 m n block_size flops a pass; memory 2 (m + n) L with L = block_size * num_passes / 2.

    Accuracy: u and v orthonormal to 1e-5 in float32 for any input. Singular values never exceed
        the true ones by more than rounding. The excess over the best possible error depends on
        the spectrum and is below 1e-4 on those of trained weights at the default setting.

    Gradients: refused with a TypeError when the derivative is asked for; unrolled iterations
        give wrong derivatives of singular vectors. Apply jax.lax.stop_gradient to `a`.

    Source: Musco and Musco 2015; Halko, Martinsson, Tropp 2011.

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
    num_passes, block_size, width = _plan_iteration(a.shape, rank, num_passes, block_size, method)
    if width >= min(a.shape[-2:]):
        return _truncated_svd(_no_derivative(a), rank)
    return _randomized_svd(_no_derivative(a), key, rank, num_passes, block_size, method)


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
    return _truncated_svd(a, _checks.check_rank(rank, a.shape))


def _plan_iteration(shape, rank, num_passes, block_size, method):
    limit = min(shape[-2:])
    if method == "krylov":
        default_passes, default_block = _KRYLOV_PASSES, max(8, -(-rank // 2))
    else:
        default_passes, default_block = _SUBSPACE_PASSES, 2 * rank
    given = num_passes is not None or block_size is not None
    num_passes = default_passes if num_passes is None else num_passes
    num_passes = _checks.check_integer(num_passes, "num_passes", minimum=2)
    if block_size is None:
        # Few passes build few blocks: each has to be wider for the basis to hold the rank.
        block_size = min(limit, max(default_block, -(-rank // (num_passes // 2))))
    block_size = _checks.check_integer(block_size, "block_size", maximum=limit)
    width = block_size * (num_passes // 2 if method == "krylov" else 1)
    if given and width < rank:
        raise ValueError(
            f"`block_size` must give a basis of at least rank = {rank} columns, got {width} "
            f"(block_size {block_size}, num_passes {num_passes}, method {method!r}). Raise one."
        )
    return num_passes, block_size, width


@functools.partial(jax.jit, static_argnames="rank")
def _truncated_svd(a, rank):
    a = to_compute(a)
    scale = power_of_two_scale(a)
    finite = jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
    # LAPACK may loop or fail on NaN; it gets zeros, and the answer is made NaN afterwards.
    u, s, vt = jnp.linalg.svd(jnp.where(finite, a / scale, 0), full_matrices=False)
    svd = SVD(u[..., :rank], s[..., :rank] * scale[..., 0], vt[..., :rank, :])
    return _poison(svd, finite)


@functools.partial(jax.jit, static_argnames=("rank", "num_passes", "block_size", "method"))
def _randomized_svd(a, key, rank, num_passes, block_size, method):
    a = to_compute(a)
    scale = power_of_two_scale(a)
    finite = jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
    a = jnp.where(finite, a / scale, 0)
    sketch_key, basis_key, noise_key = jax.random.split(key, 3)
    m, n = a.shape[-2:]
    if num_passes % 2:
        omega = matmul(a.mT, gaussian_sketch(sketch_key, m, block_size, a.dtype))
    else:
        omega = gaussian_sketch(sketch_key, n, block_size, a.dtype)
        omega = jnp.broadcast_to(omega, (*a.shape[:-2], *omega.shape))
    build = krylov_basis if method == "krylov" else subspace_basis
    basis, products = build(a, omega, num_passes // 2, key=basis_key)
    noise = gaussian_sketch(noise_key, n, products.shape[-1], a.dtype)
    svd = decompose_captured(basis, products, rank, noise)
    return _poison(SVD(svd.u, svd.s * scale[..., 0], svd.vt), finite)


def _poison(svd, finite):
    nan = jnp.asarray(jnp.nan, svd.s.dtype)
    return SVD(
        jnp.where(finite, svd.u, nan),
        jnp.where(finite[..., 0], svd.s, nan),
        jnp.where(finite, svd.vt, nan),
    )


@jax.custom_jvp
def _no_derivative(a):
    return a


@_no_derivative.defjvp
def _refuse_derivative(primals, tangents):
    raise TypeError(
        "`a` must not be differentiated in randomized_svd, got a derivative request. "
        "Apply jax.lax.stop_gradient to it, or use truncated_svd."
    )
