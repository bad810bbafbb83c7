"""A decomposition that grows until it is exact enough."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import (
    compute_dtype,
    frobenius_norm,
    matmul,
    refuse_derivative,
    safe_divide,
)
from jlora.factorization.core import decompose_core, decompose_fully
from jlora.factorization.krylov import add_block, draw_noise, start_bidiagonal
from jlora.factorization.operators import multiply, solve_stored
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import SVD, mask_nonfinite

_NUM_PROBES = 16
_BLOCK_SIZE = 16
# A basis four times as wide as the rank holds the best approximation of that rank.
_BASIS_OVER_RANK = 4
_MARGIN = 2.0  # standard errors of the probes' mean that are added before it is trusted


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("svd", "rank", "error", "is_reached"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class AdaptiveSVD:
    """What `adaptive_svd` gives back; unpacks as `svd, rank`.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (40, 30))
        >>> svd, rank = jlora.adaptive_svd(a, tolerance=0.5, max_rank=30, key=jax.random.key(1))
        >>> svd.s.shape
        (30,)
    """

    svd: SVD  # padded with zeros to max_rank
    rank: jax.Array  # [...] int32, triplets kept
    error: jax.Array  # [...], estimate of ‖a − u s vt‖_F / ‖a‖_F
    is_reached: jax.Array  # [...] bool, whether the error is below the tolerance

    def __iter__(self):
        return iter((self.svd, self.rank))


def adaptive_svd(a, *, tolerance, max_rank, key):
    """Return the shortest SVD found with ‖a − u diag(s) vt‖_F ≤ tolerance ‖a‖_F.

    Block Krylov grows its basis, two passes a block, while the error of the projection on it,
    estimated by random probes that each block is taken out of, and the tail of the singular
    values inside it leave the tolerance unmet; all in one compiled loop.

    Shapes: m, n rows and columns, R = max_rank, ... batch axes.

    Args:
        a: [..., m, n] real floating.
        tolerance: in (0, 1), static.
        max_rank: static, 1 ≤ max_rank ≤ min(m, n).
        key: one typed PRNG key, consumed.

    Returns:
        `AdaptiveSVD`, which unpacks as (svd, rank): `SVD` of u [..., m, R], s [..., R],
        vt [..., R, n], zero beyond the rank kept, and that rank [...] int32. Also `error`, the
        estimate behind it, and `is_reached`: False where max_rank was not enough, or where the
        tolerance lies below what the arithmetic resolves (50 eps, 6e-6 in float32).

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: tolerance or max_rank out of range.

    Cost: as `randomized_svd` with as many blocks of 16 as are needed, and one pass for 16
        probes. A batch goes on until its last matrix is done.

    Accuracy: what the basis misses is estimated from 16 probes, and counted with two standard
        errors of their mean on top; the tail inside the basis is exact. The rank is within a
        few of the least possible one where that is below about max_rank.

    Gradients: refused with a TypeError, as those of `randomized_svd`.

    Source: the probes of Halko, Martinsson, Tropp 2011, section 4.3, updated as in Yu, Gu, Li,
        "Efficient randomized algorithms for the fixed-precision low-rank approximation", 2018.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> a = jnp.diag(0.5 ** jnp.arange(60.0))
        >>> svd, rank = jlora.adaptive_svd(a, tolerance=0.01, max_rank=20, key=jax.random.key(0))
        >>> int(rank), svd.u.shape
        (7, (60, 20))
    """
    a = _checks.check_matrix(a)
    max_rank = _checks.check_rank(max_rank, a.shape, "max_rank")
    _checks.check_key(key)
    _check_tolerance(tolerance)
    return _adapt(refuse_derivative(a), key, float(tolerance), max_rank)


def _check_tolerance(tolerance):
    if isinstance(tolerance, (bool, jax.core.Tracer)) or not isinstance(
        tolerance, (int, float)
    ):
        raise TypeError(
            f"`tolerance` must be a Python number, got {type(tolerance).__name__}. "
            "Convert it with float()."
        )
    if not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` must lie in (0, 1), got {tolerance}. It is relative to the norm of a."
        )


@functools.partial(jax.jit, static_argnames=("tolerance", "max_rank"))
def _adapt(a, key, tolerance, max_rank):
    limit = min(a.shape[-2:])
    block = min(_BLOCK_SIZE, max_rank)
    num_blocks = -(-_BASIS_OVER_RANK * max_rank // block) + 4
    norm = frobenius_norm(a.astype(compute_dtype(a.dtype)))
    if (num_blocks + 1) * block > limit:
        svd = decompose_fully(a, limit)
        missed = (jnp.zeros_like(norm),) * 2
    else:
        solve = functools.partial(
            _grow,
            target=0.5 * tolerance,
            block=block,
            num_blocks=num_blocks,
            max_rank=max_rank,
        )
        svd, missed = solve_stored(solve, a, norm, key)
    return _cut(svd, missed, norm, tolerance, max_rank)


def _grow(a, norm, key, *, target, block, num_blocks, max_rank):
    """Return the SVD of the projection on the basis, and what it misses: estimate, upper end."""
    sketch_key, noise_key, probe_key, core_key = jax.random.split(key, 4)
    batch, n = a.shape[:-2], a.shape[-1]
    dtype = norm.dtype
    omega = gaussian_sketch(sketch_key, block, n, dtype)
    noise = draw_noise(noise_key, a, omega, num_blocks)
    probes = gaussian_sketch(probe_key, _NUM_PROBES, n, dtype)
    probes = multiply(a, jnp.broadcast_to(probes, (*batch, _NUM_PROBES, n)))

    def estimate(probes):
        """Return the estimate and its upper end, both relative to the norm."""
        unit = jnp.where(norm > 0, norm, 1)[..., None]
        squares = jnp.sum((probes / unit[..., None]) ** 2, axis=-1)
        mean, spread = jnp.mean(squares, axis=-1), jnp.std(squares, axis=-1, ddof=1)
        return jnp.sqrt(mean), jnp.sqrt(mean + _MARGIN * spread / _NUM_PROBES**0.5)

    def is_open(state):
        i, _, probes = state
        return (i < num_blocks) & jnp.any(estimate(probes)[1] > target)

    def grow(state):
        i, factors, probes = state
        factors = add_block(a, factors, i, block, noise, num_blocks * block)
        new = jax.lax.dynamic_slice_in_dim(factors.left, i * block, block, axis=-2)
        return i + 1, factors, probes - matmul(matmul(probes, new.mT), new)

    start = (0, start_bidiagonal(a, omega, num_blocks, noise), probes)
    _, (left, core, right), probes = jax.lax.while_loop(is_open, grow, start)
    width = core.shape[-2]
    fresh = gaussian_sketch(core_key, width, core.shape[-1], dtype)
    e, s, f = decompose_core(core, width, fresh)
    return SVD(matmul(e.mT, left).mT, s, matmul(f, right)), estimate(probes)


def _cut(svd, missed, norm, tolerance, max_rank):
    """Return the `AdaptiveSVD` of the shortest cut whose estimated error is small enough."""
    relative = safe_divide(svd.s, norm[..., None])
    # Summed from the smallest: tail[k] is what a cut to rank k leaves.
    tail = jnp.cumsum(relative[..., ::-1] ** 2, axis=-1)[..., ::-1]
    tail = jnp.concatenate([tail, jnp.zeros_like(tail[..., :1])], axis=-1)[
        ..., : max_rank + 1
    ]
    errors, upper = (jnp.sqrt(tail + part[..., None] ** 2) for part in missed)
    is_enough = upper <= tolerance
    is_reached = jnp.any(is_enough, axis=-1)
    rank = jnp.where(is_reached, jnp.argmax(is_enough, axis=-1), max_rank).astype(
        jnp.int32
    )
    error = jnp.take_along_axis(errors, rank[..., None], axis=-1)[..., 0]
    is_resolved = tolerance >= 50 * jnp.finfo(errors.dtype).eps
    places = jnp.broadcast_to(
        jnp.arange(max_rank, dtype=rank.dtype), (*rank.shape, max_rank)
    )
    keep = places < rank[..., None]
    u, s, vt = svd.u[..., :max_rank], svd.s[..., :max_rank], svd.vt[..., :max_rank, :]
    kept = SVD(
        jnp.where(keep[..., None, :], u, 0),
        jnp.where(keep, s, 0),
        jnp.where(keep[..., :, None], vt, 0),
    )
    finite = jnp.isfinite(norm)
    kept = mask_nonfinite(kept, finite[..., None, None])
    return AdaptiveSVD(
        kept, rank, jnp.where(finite, error, jnp.nan), is_reached & finite & is_resolved
    )
