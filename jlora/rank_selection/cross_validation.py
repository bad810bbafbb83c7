"""The rank that best predicts held-out entries of a matrix."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import matmul, power_of_two_scale, safe_divide, to_compute
from jlora._types import AnyArray, Array, Float, Int, PRNGKey
from jlora.factorization.svd import randomized_svd
from jlora.rank_selection.rules import RankChoice
from jlora.rank_selection.spectrum import refuse_tracer


def cross_validate_rank(
    a: Float[AnyArray, "m n"], *, max_rank: int, key: PRNGKey, num_folds: int = 4
) -> RankChoice:
    """Return the rank with the smallest bi-cross-validation error, and all errors.

    Rows and columns are divided at random into `num_folds` groups each. Each pair of a
    row group I and a column group J holds out the block a[I, J]. The prediction of that
    block at rank k is a[I, ~J] pinv(b_k) a[~I, J], with b_k the best rank-k
    approximation of a[~I, ~J]. The held-out error falls while components carry signal,
    and rises once they only fit noise.

    Args:
        a: one matrix, concrete.
        max_rank: static, the largest rank tried, at most
            min(m - m // num_folds, n - n // num_folds).
        key: one typed PRNG key, consumed.
        num_folds: static, from 2 to min(m, n). If it does not divide m or n, the
            remaining rows or columns are in no held-out block.

    Returns:
        `RankChoice`, unpacks as (rank, curve). The curve is the squared error at rank
        1, 2, ..., relative to the prediction zero. The rank is 0 if no error is below
        1.

    Raises:
        TypeError: an argument of the wrong kind, or a traced matrix.
        ValueError: a size out of its range, or a matrix that is not finite.

    Cost: num_folds² runs of `randomized_svd` on a share 1 - 1/num_folds of the rows and
        columns, in batches of num_folds. Memory for num_folds copies of the matrix.

    Accuracy: for signal in noise. Without noise, the errors from the true rank on are
        rounding errors, and the smallest of them decides.

    Source: Owen and Perry, "Bi-cross-validation of the SVD and the nonnegative matrix
        factorization", 2009, section 3.

    Example:
        >>> import jax, jlora
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> u = jax.random.normal(keys[0], (60, 3))
        >>> v = jax.random.normal(keys[1], (3, 50))
        >>> a = u @ v + 0.1 * jax.random.normal(keys[2], (60, 50))
        >>> key = jax.random.key(1)
        >>> jlora.rank_selection.cross_validate_rank(a, max_rank=10, key=key).rank
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
    limit = min(size - size // num_folds for size in a.shape)
    max_rank = _checks.check_integer(max_rank, "max_rank", maximum=limit)

    errors = np.asarray(_cross_validate(a, key, max_rank, num_folds), np.float64)
    if not errors[0] > 0:  # a matrix of zeros
        return RankChoice(0, np.zeros(max_rank))
    curve = errors[1:] / errors[0]
    return RankChoice(int(np.argmin(np.concatenate([[1.0], curve]))), curve)


@functools.partial(jax.jit, static_argnames=("max_rank", "num_folds"))
def _cross_validate(
    a: Float[Array, "m n"], key: PRNGKey, max_rank: int, num_folds: int
) -> Float[Array, " errors"]:
    """Return the summed squared errors of ranks 0, 1, ..., max_rank."""
    a = to_compute(a)
    a = a / power_of_two_scale(a)
    row_key, column_key, svd_key = jax.random.split(key, 3)
    a = jax.random.permutation(row_key, a, axis=0)
    a = jax.random.permutation(column_key, a, axis=1)

    m, n = a.shape
    num_rows, num_columns = m // num_folds, n // num_folds

    def measure_fold(fold: Int[Array, ""]) -> Float[Array, " errors"]:
        # Roll the held-out block into the corner: all folds then have one shape.
        i, j = fold // num_folds, fold % num_folds
        rolled = jnp.roll(jnp.roll(a, -i * num_rows, axis=0), -j * num_columns, axis=1)
        return _measure_corner(rolled, num_rows, num_columns, max_rank, svd_key)

    # Batches under vmap, one after another: each fold holds a copy of the matrix.
    errors = jax.lax.map(measure_fold, jnp.arange(num_folds**2), batch_size=num_folds)
    return jnp.sum(errors, axis=0)


def _measure_corner(
    a: Float[Array, "m n"], num_rows: int, num_columns: int, max_rank: int, key: PRNGKey
) -> Float[Array, " errors"]:
    """Return the squared errors of predicting a[:num_rows, :num_columns]."""
    corner, right = a[:num_rows, :num_columns], a[:num_rows, num_columns:]
    below, rest = a[num_rows:, :num_columns], a[num_rows:, num_columns:]

    # The key is the same for all folds, so a batch of them shares one test matrix.
    u, s, vt = randomized_svd(rest, max_rank, key=key)
    floor = jnp.finfo(s.dtype).eps * max(rest.shape) * s[0]
    inverse = safe_divide(jnp.ones_like(s), jnp.where(s > floor, s, 0))
    left, right = matmul(right, vt.T) * inverse[None], matmul(u.T, below)

    def add_rank(
        residual: Float[Array, "i j"], k: Int[Array, ""]
    ) -> tuple[Float[Array, "i j"], Float[Array, ""]]:
        residual = residual - left[:, k, None] * right[None, k]
        return residual, jnp.sum(residual**2)

    _, errors = jax.lax.scan(add_rank, corner, jnp.arange(max_rank))
    return jnp.concatenate([jnp.sum(corner**2)[None], errors])
