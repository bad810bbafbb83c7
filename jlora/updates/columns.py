"""Columns of a factorised matrix set, replaced or removed."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import matmul, to_compute
from jlora.factors import SVD, Factors, check_svd
from jlora.updates.additive import add_low_rank
from jlora.updates.recompression import decompose_product


def set_columns(factors, columns, values):
    """Return the factors with v[..., columns] = values: a domain's weight vectors in V.

    Only these columns of u @ v change; they become u @ values. Of an SVD, v is diag(s) vt, and
    what comes back is an SVD again: its columns stay within the span of u, and its rank is kept.

    Shapes: m, n rows and columns of u @ v, r rank, k columns set.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n], or an `SVD`.
        columns: an integer k (static: the last k columns), a slice, or a 1-D array of k
            distinct indices. Indices that are traced are not checked, and those out of range
            are dropped.
        values: [..., r, k] real floating, cast to the dtype of v. Batch axes as v, or none.

    Returns:
        `Factors` in the dtypes given, or an `SVD` in the compute dtype.

    Raises:
        TypeError: factors, indices or values of the wrong kind.
        ValueError: an index out of range or named twice, or `values` of another shape.

    Cost: a copy of v; of an SVD O((m + n) r²) flops.

    Gradients: exact, to u, to the columns of v that stay, and to `values`; of an SVD as those of
        `recompress`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.zeros((1, 4)))
        >>> jlora.set_columns(factors, 2, jnp.array([[7.0, 8.0]])).v.tolist()
        [[0.0, 0.0, 7.0, 8.0]]
    """
    is_svd = isinstance(factors, tuple) and len(factors) == 3
    if is_svd:
        u, s, vt = check_svd(factors, "factors")
        v = s[..., None] * vt
    else:
        u, v = _checks.check_factors(factors)
    values = _checks.check_matrix(values, "values")
    indices = _checks.check_columns(columns, v.shape[-1])
    batch = v.shape[:-2] if values.ndim > 2 else ()
    expected = (*batch, v.shape[-2], len(indices))
    _checks.check_shape(
        values.shape, expected, "values", "rank rows, one column for each set"
    )
    v = v.at[..., indices].set(values.astype(v.dtype))
    return decompose_product(u, v, v.shape[-2]) if is_svd else Factors(u, v)


def replace_columns(svd, columns, c, *, rank=None):
    """Return the SVD of the matrix of an SVD with other columns in place of some of its own.

    A low-rank term is added: the differences of the columns, each at its place.

    Shapes: m, n rows and columns, r the rank of the SVD, k columns replaced.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        columns: as in `set_columns`.
        c: [..., m, k] real floating, the new columns.
        rank: as in `add_low_rank`, at most min(m, n, r + k).

    Returns:
        `SVD` of the matrix so changed, in the common compute dtype.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: an index out of range or named twice, shapes that do not fit, or a rank out
            of its range.

    Cost, Gradients: those of `add_low_rank`.

    Accuracy: exact to rounding of the larger of the matrix and the new columns. Where the columns
        that go held all but 1e-3 of the norm, what is left has lost as many digits.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([3.0, 2.0])), 2)
        >>> jlora.updates.replace_columns(svd, [0], jnp.array([[5.0], [0.0]])).s.round(4).tolist()
        [5.0, 2.0]
    """
    u, s, vt = check_svd(svd)
    c = _checks.check_matrix(c, "c")
    n = vt.shape[-1]
    indices = _checks.check_columns(columns, n)
    k = len(indices)
    _checks.check_shape(
        c.shape, (*u.shape[:-1], k), "c", "rows of svd.u, a column for each"
    )
    u, s, vt, c = to_compute(u, s, vt, c)
    difference = c - matmul(u * s[..., None, :], vt[..., indices])
    places = jnp.zeros((k, n), vt.dtype).at[jnp.arange(k), indices].set(1)
    places = jnp.broadcast_to(places, (*vt.shape[:-2], k, n))
    return add_low_rank(SVD(u, s, vt), difference, places, rank=rank)


def remove_columns(svd, columns):
    """Return the SVD of the matrix of an SVD without some of its columns.

    Shapes: m, n rows and columns, r the rank of the SVD, k columns removed.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        columns: as in `set_columns`, static, fewer than n.

    Returns:
        `SVD` of u [..., m, q], s [..., q], vt [..., q, n - k], q = min(r, n - k), in the compute
        dtype. Singular values that went with the columns are zero.

    Raises:
        TypeError: arguments of the wrong kind, or indices that are traced.
        ValueError: an index out of range or named twice, or no column left.

    Cost: O((m + n) r²) flops.

    Accuracy: exact to rounding of the matrix that the columns are taken from.

    Gradients: as those of `recompress`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 3)
        >>> jlora.updates.remove_columns(svd, 1).s.round(4).tolist()
        [3.0, 2.0]
    """
    u, s, vt = check_svd(svd)
    n = vt.shape[-1]
    indices = _checks.check_columns(columns, n)
    if isinstance(indices, jax.core.Tracer):
        raise TypeError(
            "`columns` must be static, got a traced array: the shape of the result depends on "
            "how many there are. Pass Python integers or a NumPy array."
        )
    if len(indices) == n:
        raise ValueError(
            f"`columns` must leave at least one of {n} columns, got all of them. Name fewer."
        )
    left = np.delete(np.arange(n), indices)
    return decompose_product(
        u, s[..., None] * vt[..., left], min(s.shape[-1], len(left))
    )
