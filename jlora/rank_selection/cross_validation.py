"""The rank that predicts held-out entries of a matrix best."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import matmul, power_of_two_scale, safe_divide, to_compute
from jlora.factorization.svd import randomized_svd
from jlora.rank_selection.rules import RankChoice
from jlora.rank_selection.spectrum import refuse_tracer


def cross_validate_rank(a, *, max_rank, key, num_folds=4):
    """Return the rank with the least bi-cross-validation error, and the curve of errors.

    Rows and columns are cut into `num_folds` parts at random. Each pair of a row part I and a
    column part J holds out a block; what is predicted for it from the rest at rank k is
    a[I, ~J] (pseudo-inverse of the best rank-k approximation of a[~I, ~J]) a[~I, J]. Noise cannot
    be predicted: from the rank on at which only noise is added, the error grows.

    Shapes: m, n rows and columns.

    Args:
        a: [m, n] real floating.
        max_rank: static, the largest rank tried, at most min(m, n) less the largest part.
        key: one typed PRNG key, consumed.
        num_folds: static, at least 2, at most min(m, n); rows and columns beyond a multiple of
            it are left out of each fold's held-out blocks.

    Returns:
        `RankChoice`, unpacks as (rank, curve): the curve is the error for rank 1, 2, ...
        relative to that of predicting zero, in [0, ...]; the rank is 0 where all are above 1.

    Raises:
        TypeError: arguments of the wrong kind, or a traced matrix.
        ValueError: sizes out of range, or a matrix that is not finite.

    Cost: num_folds² times `randomized_svd` of (1 - 1/num_folds) of the rows and columns, in
        batches of num_folds; memory for as many copies of the matrix.

    Accuracy: for signal above noise. A spectrum without noise has its least error at its rank,
        by rounding alone.

    Source: Owen and Perry, "Bi-cross-validation of the SVD and the nonnegative matrix
        factorization", 2009, section 3.

    Example:
        >>> import jax, jlora
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> u, v = jax.random.normal(keys[0], (60, 3)), jax.random.normal(keys[1], (3, 50))
        >>> a = u @ v + 0.1 * jax.random.normal(keys[2], (60, 50))
        >>> jlora.rank_selection.cross_validate_rank(a, max_rank=10, key=jax.random.key(1)).rank
        3
    """
    a = _checks.check_matrix(a)
    refuse_tracer(a)
    if a.ndim != 2:
        raise ValueError(
            f"`a` must be one matrix [m, n], got shape {a.shape}. Loop over a batch."
        )
    _checks.check_finite(a, "a")
    _checks.check_key(key)
    num_folds = _checks.check_integer(
        num_folds, "num_folds", minimum=2, maximum=min(a.shape)
    )
    kept = min(size - size // num_folds for size in a.shape)
    max_rank = _checks.check_integer(max_rank, "max_rank", maximum=kept)
    errors = np.asarray(_cross_validate(a, key, max_rank, num_folds), np.float64)
    if not errors[0] > 0:  # a matrix of zeros
        return RankChoice(0, np.zeros(max_rank))
    curve = errors[1:] / errors[0]
    return RankChoice(int(np.argmin(np.concatenate([[1.0], curve]))), curve)


@functools.partial(jax.jit, static_argnames=("max_rank", "num_folds"))
def _cross_validate(a, key, max_rank, num_folds):
    """Return the summed squared error of rank 0, 1, ..., max_rank."""
    a = to_compute(a)
    a = a / power_of_two_scale(a)
    row_key, column_key, svd_key = jax.random.split(key, 3)
    a = jax.random.permutation(row_key, a, axis=0)
    a = jax.random.permutation(column_key, a, axis=1)
    m, n = a.shape
    rows, columns = m // num_folds, n // num_folds

    def measure_fold(fold):
        # The held-out block is turned into the corner: all folds have one shape.
        i, j = fold // num_folds, fold % num_folds
        turned = jnp.roll(a, (-i * rows, -j * columns), axis=(0, 1))
        return _measure_corner(turned, rows, columns, max_rank, svd_key)

    # Batches under vmap, one after the other: each fold holds a copy of the matrix.
    each = jax.lax.map(measure_fold, jnp.arange(num_folds**2), batch_size=num_folds)
    return jnp.sum(each, axis=0)


def _measure_corner(a, rows, columns, max_rank, key):
    """Return the squared errors of predicting a[:rows, :columns] from the other three blocks."""
    corner, right = a[:rows, :columns], a[:rows, columns:]
    below, rest = a[rows:, :columns], a[rows:, columns:]
    u, s, vt = randomized_svd(rest, max_rank, key=key)
    least = jnp.finfo(s.dtype).eps * max(rest.shape) * s[0]
    inverse = safe_divide(jnp.ones_like(s), jnp.where(s > least, s, 0))
    left, right = matmul(right, vt.T) * inverse[None], matmul(u.T, below)

    def add_rank(error, k):
        error = error - left[:, k, None] * right[None, k]
        return error, jnp.sum(error**2)

    _, errors = jax.lax.scan(add_rank, corner, jnp.arange(max_rank))
    return jnp.concatenate([jnp.sum(corner**2)[None], errors])
