"""An SVD that adds blocks to its bases until its error is below a tolerance."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _checks
from jlora._numerics import (
    compute_dtype,
    frobenius_norm,
    matmul,
    refuse_derivative,
    safe_divide,
)
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Bool, Float, Int, PRNGKey
from jlora.factorization.full import decompose_fully
from jlora.factorization.krylov import add_block, draw_noise, make_first_block
from jlora.factorization.operators import Matrix, multiply, solve_stored
from jlora.factorization.projection import Projection, decompose_projection
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import NEW_SVD_AXES, SVD, mask_nonfinite, mask_rank

_NUM_PROBES = 16
_BLOCK_SIZE = 16
# A basis four times as wide as the rank holds the best approximation of that rank.
_BASIS_OVER_RANK = 4
# Number of standard errors that the upper end adds to the mean over the probes.
_MARGIN = 2.0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("svd", "rank", "error", "is_reached"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class AdaptiveSVD:
    """The result of `adaptive_svd`. It unpacks as `svd, rank`.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (40, 30))
        >>> key = jax.random.key(1)
        >>> svd, rank = jlora.adaptive_svd(a, tolerance=0.5, max_rank=30, key=key)
        >>> svd.s.shape
        (30,)
    """

    svd: SVD  # zero beyond the first `rank` of max_rank triplets
    rank: Int[Array, "*batch"]  # int32, the number of triplets kept
    error: Float[Array, "*batch"]  # estimate of ‖a − u diag(s) vt‖_F / ‖a‖_F
    is_reached: Bool[Array, "*batch"]  # whether the error is below the tolerance

    def __iter__(self) -> Iterator[Any]:
        """Yield the SVD, then the rank."""
        return iter((self.svd, self.rank))


class _ErrorEstimate(NamedTuple):
    """‖a − its projection‖_F / ‖a‖_F."""

    mean: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]


class _State(NamedTuple):
    """The loop that adds blocks."""

    num_blocks: int | Int[Array, ""]
    projection: Projection
    probes: Float[Array, "*batch p m"]  # (a @ omega)ᵀ, minus its part in the left basis


def adaptive_svd(
    a: Float[AnyArray, "*batch m n"], *, tolerance: float, max_rank: int, key: PRNGKey
) -> AdaptiveSVD:
    """Return the shortest SVD found with ‖a − u diag(s) vt‖_F ≤ tolerance ‖a‖_F.

    Adds Krylov blocks, two passes each, until the estimated error of the projection is
    well below the tolerance, and then truncates. Random probes, orthogonalised against
    each new block, give the estimate. Everything runs in one compiled loop.

    Args:
        a: real floating.
        tolerance: static, in (0, 1).
        max_rank: static, 1 ≤ max_rank ≤ min(m, n).
        key: one typed PRNG key, consumed.

    Returns:
        `AdaptiveSVD`, which unpacks as (svd, rank). `svd` is the `SVD` of
        u [..., m, max_rank], s [..., max_rank], vt [..., max_rank, n], zero beyond the
        rank. `rank` is int32 [...]. `error` is the estimated relative error.
        `is_reached` is False where max_rank was too small, or where the tolerance is
        below the resolution of the arithmetic (50 eps, 6e-6 in float32).

    Raises:
        TypeError: an argument has the wrong kind.
        ValueError: tolerance or max_rank is out of range.

    Cost: as `randomized_svd` with as many blocks of 16 as are needed, and one pass for
        16 probes. A batch runs until its last matrix is done.

    Accuracy: the truncation error inside the basis is exact. The error of the
        projection is estimated from 16 probes, and the decision adds two standard
        errors of their mean. If the least possible rank is below about max_rank, the
        rank found exceeds it by a few at most.

    Gradients: refused with a TypeError, as by `randomized_svd`.

    Source: the probes of Halko, Martinsson, Tropp 2011, section 4.3, updated as in Yu,
        Gu, Li, "Efficient randomized algorithms for the fixed-precision low-rank
        approximation", 2018.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> a = jnp.diag(0.5 ** jnp.arange(60.0))
        >>> key = jax.random.key(0)
        >>> svd, rank = jlora.adaptive_svd(a, tolerance=0.01, max_rank=20, key=key)
        >>> int(rank), svd.u.shape
        (7, (60, 20))
    """
    a = _checks.check_matrix(a)
    max_rank = _checks.check_rank(max_rank, a.shape, "max_rank")
    _checks.check_key(key)
    _check_tolerance(tolerance)
    return _adaptive_svd(refuse_derivative(a), key, float(tolerance), max_rank)


def _check_tolerance(tolerance: float) -> None:
    is_traced = isinstance(tolerance, Tracer)
    is_number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if is_traced or not is_number:
        raise TypeError(
            f"`tolerance` must be a Python number, got {type(tolerance).__name__}. "
            "Convert it with float()."
        )

    if not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` must lie in (0, 1), got {tolerance}. "
            "It is relative to the norm of a."
        )


@functools.partial(jax.jit, static_argnames=("tolerance", "max_rank"))
def _adaptive_svd(
    a: Float[Array, "*batch m n"], key: PRNGKey, tolerance: float, max_rank: int
) -> AdaptiveSVD:
    return AdaptiveSVD(*_find_parts(a, key, tolerance, max_rank))


@follow_axes("*b m n", None, result=(NEW_SVD_AXES, "*b", "*b", "*b"))
def _find_parts(
    a: Float[Array, "*batch m n"], key: PRNGKey, tolerance: float, max_rank: int
) -> tuple[SVD, Array, Array, Array]:
    """Return the fields of `AdaptiveSVD`."""
    limit = min(a.shape[-2:])
    block_size = min(_BLOCK_SIZE, max_rank)
    max_blocks = -(-_BASIS_OVER_RANK * max_rank // block_size) + 4
    norm = frobenius_norm(a.astype(compute_dtype(a.dtype)))

    if (max_blocks + 1) * block_size > limit:
        svd = decompose_fully(a, limit)
        zeros = jnp.zeros_like(norm)
        error = _ErrorEstimate(mean=zeros, upper=zeros)
    else:
        decompose = functools.partial(
            _decompose_by_blocks,
            target=0.5 * tolerance,
            block_size=block_size,
            max_blocks=max_blocks,
        )
        svd, error = solve_stored(decompose, a, norm, key)
    found = _truncate(svd, error, norm, tolerance, max_rank)
    return found.svd, found.rank, found.error, found.is_reached


def _decompose_by_blocks(
    a: Matrix,
    norm: Float[Array, "*batch"],
    key: PRNGKey,
    *,
    target: float,
    block_size: int,
    max_blocks: int,
) -> tuple[SVD, _ErrorEstimate]:
    """Return the SVD of a projection whose error is below `target`, and that error."""
    sketch_key, noise_key, probe_key, core_key = jax.random.split(key, 4)
    batch, n = a.shape[:-2], a.shape[-1]
    omega = gaussian_sketch(sketch_key, block_size, n, norm.dtype)
    noise = draw_noise(noise_key, a, block_size, omega.dtype)
    width = max_blocks * block_size

    def is_open(state: _State) -> Bool[Array, ""]:
        error = _estimate_error(state.probes, norm)
        return (state.num_blocks < max_blocks) & jnp.any(error.upper > target)

    def grow(state: _State) -> _State:
        i, projection, probes = state
        projection = add_block(a, projection, jnp.asarray(i), noise, width)
        new = jax.lax.dynamic_slice_in_dim(
            projection.left, i * block_size, block_size, axis=-2
        )
        probes = probes - matmul(matmul(probes, new.mT), new)
        return _State(i + 1, projection, probes)

    probes = gaussian_sketch(probe_key, _NUM_PROBES, n, norm.dtype)
    probes = multiply(a, jnp.broadcast_to(probes, (*batch, _NUM_PROBES, n)))
    state = _State(0, make_first_block(a, omega, max_blocks, noise), probes)
    state = jax.lax.while_loop(is_open, grow, state)

    svd = decompose_projection(state.projection, width, key=core_key)
    return svd, _estimate_error(state.probes, norm)


def _estimate_error(
    probes: Float[Array, "*batch p m"], norm: Float[Array, "*batch"]
) -> _ErrorEstimate:
    """Return the error of a projection from its probes (see `_State`)."""
    unit = jnp.where(norm > 0, norm, 1)[..., None]
    squares = jnp.sum((probes / unit[..., None]) ** 2, axis=-1)
    mean, std = jnp.mean(squares, axis=-1), jnp.std(squares, axis=-1, ddof=1)
    upper = mean + _MARGIN * std / _NUM_PROBES**0.5
    return _ErrorEstimate(jnp.sqrt(mean), jnp.sqrt(upper))


def _truncate(
    svd: SVD,
    error: _ErrorEstimate,
    norm: Float[Array, "*batch"],
    tolerance: float,
    max_rank: int,
) -> AdaptiveSVD:
    """Return the `AdaptiveSVD` of the least rank with a small enough estimated error.

    `svd` is the SVD of the projection, and `error` the error of the projection.
    """
    # tail[k] is the squared error of a truncation to rank k, for k = 0 to max_rank.
    relative = safe_divide(svd.s, norm[..., None])
    tail = jnp.cumsum(relative[..., ::-1] ** 2, axis=-1)[..., ::-1]
    tail = jnp.concatenate([tail, jnp.zeros_like(tail[..., :1])], axis=-1)
    tail = tail[..., : max_rank + 1]

    # The least rank within the tolerance.
    errors, upper = (jnp.sqrt(tail + part[..., None] ** 2) for part in error)
    is_enough = upper <= tolerance
    is_reached = jnp.any(is_enough, axis=-1)
    rank = jnp.where(is_reached, jnp.argmax(is_enough, axis=-1), max_rank)
    rank = rank.astype(jnp.int32)
    total = jnp.take_along_axis(errors, rank[..., None], axis=-1)[..., 0]
    is_resolved = tolerance >= 50 * jnp.finfo(errors.dtype).eps

    # Truncate, and mark matrices that hold NaN or Inf.
    u, s, vt = svd
    kept = SVD(u[..., :max_rank], s[..., :max_rank], vt[..., :max_rank, :])
    finite = jnp.isfinite(norm)
    kept = mask_nonfinite(mask_rank(kept, rank), finite[..., None, None])
    return AdaptiveSVD(
        svd=kept,
        rank=rank,
        error=jnp.where(finite, total, jnp.nan),
        is_reached=is_reached & finite & is_resolved,
    )
