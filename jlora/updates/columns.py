"""Columns of a factorised matrix set, replaced or removed."""

from __future__ import annotations

from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _checks
from jlora._columns import Columns, check_columns
from jlora._numerics import to_compute
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, Int
from jlora.factors import NEW_FACTORS_AXES, SVD, SVD_AXES, Factors, check_svd
from jlora.updates.products import decompose_product


@overload
def set_columns(
    factors: Factors, columns: Columns, values: Float[AnyArray, "... r k"]
) -> Factors: ...


@overload
def set_columns(
    factors: SVD, columns: Columns, values: Float[AnyArray, "... r k"]
) -> SVD: ...


def set_columns(
    factors: Any, columns: Columns, values: Float[AnyArray, "... r k"]
) -> Factors | SVD:
    """Return the factors with v[..., columns] = values: a domain's weight vectors in V.

    Only these columns of u @ v change; they become u @ values. For an SVD, v is
    diag(s) vt and the result is an SVD again, of the same rank: the columns stay within
    the span of u.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n], or an `SVD`.
        columns: an integer k (static: the last k columns), a slice, or a 1-D array of k
            distinct indices. Traced indices are not checked, and dropped if they are
            out of range.
        values: cast to the dtype of v. Batch axes as v, or none.

    Returns:
        `Factors` in the given dtypes, or an `SVD` in the compute dtype.

    Raises:
        TypeError: factors, indices or values of the wrong kind.
        ValueError: an index out of range or repeated, or `values` of another shape.

    Cost: a copy of v; for an SVD O((m + n) r²) flops.

    Gradients: exact, to u, to the other columns of v, and to `values`; for an SVD as
        `recompress`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.zeros((1, 4)))
        >>> jlora.set_columns(factors, 2, jnp.array([[7.0, 8.0]])).v.tolist()
        [[0.0, 0.0, 7.0, 8.0]]
    """
    is_svd = _is_svd(factors)
    if is_svd:
        u, s, vt = check_svd(factors, "factors")
        v = s[..., None] * vt
    else:
        u, v = _checks.check_factors(factors)

    values = _checks.check_matrix(values, "values")
    indices = check_columns(columns, v.shape[-1])
    batch = v.shape[:-2] if values.ndim > 2 else ()
    expected = (*batch, v.shape[-2], len(indices))
    meaning = "rank rows, one column for each set"
    _checks.check_shape(values.shape, expected, "values", meaning)

    v = _put_columns(v, jnp.asarray(indices), values.astype(v.dtype))
    return decompose_product(u, v, v.shape[-2]) if is_svd else Factors(u, v)


@jax.jit
@follow_axes("*b r n", None, None, result="*b r n")
def _put_columns(
    v: Float[Array, "*batch r n"], indices: Int[Array, " k"], values: Array
) -> Float[Array, "*batch r n"]:
    return v.at[..., indices].set(values)


def _is_svd(factors: Any) -> bool:
    return isinstance(factors, tuple) and len(factors) == 3


def replace_columns(
    svd: SVD,
    columns: Columns,
    c: Float[AnyArray, "*batch m k"],
    *,
    rank: int | None = None,
) -> SVD:
    """Return the SVD of the matrix of the given SVD with some columns replaced.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        columns: as in `set_columns`.
        c: the new columns.
        rank: as in `add_low_rank`, at most min(m, n, r + k).

    Returns:
        `SVD` of the changed matrix, in the common compute dtype.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: an index out of range or repeated, shapes that do not fit, or a rank
            out of its range.

    Cost, Gradients: as `recompress` of rank r + k.

    Accuracy: exact to rounding of the result. The replaced columns are not read: they
        may hold NaN.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([3.0, 2.0])), 2)
        >>> c = jnp.array([[5.0], [0.0]])
        >>> jlora.updates.replace_columns(svd, [0], c).s.round(4).tolist()
        [5.0, 2.0]
    """
    u, s, vt = check_svd(svd)
    c = _checks.check_matrix(c, "c")
    n = vt.shape[-1]
    indices = check_columns(columns, n)
    k = len(indices)
    meaning = "rows of svd.u, a column for each"
    _checks.check_shape(c.shape, (*u.shape[:-1], k), "c", meaning)

    limit = min(u.shape[-2], n, s.shape[-1] + k)
    if rank is None:
        rank = limit
    rank = _checks.check_integer(rank, "rank", maximum=limit)

    # [u diag(s), c] @ [vt with zeros in these columns; ones there]. The old columns are
    # not read: NaN in them does no harm, and large values cost no accuracy.
    left, right = _replace_columns(SVD(u, s, vt), c, jnp.asarray(indices))
    return decompose_product(left, right, rank)


@jax.jit
@follow_axes(SVD_AXES, "*b m k", None, result=NEW_FACTORS_AXES)
def _replace_columns(
    svd: SVD, c: Float[Array, "*batch m k"], indices: Int[Array, " k"]
) -> Factors:
    u, s, vt, c = to_compute(*svd, c)
    k, n = c.shape[-1], vt.shape[-1]
    selection = jnp.zeros((k, n), vt.dtype).at[jnp.arange(k), indices].set(1)
    selection = jnp.broadcast_to(selection, (*vt.shape[:-2], k, n))
    kept = vt.at[..., indices].set(0)
    left = jnp.concatenate([u * s[..., None, :], c], axis=-1)
    return Factors(left, jnp.concatenate([kept, selection], axis=-2))


def remove_columns(svd: SVD, columns: Columns) -> SVD:
    """Return the SVD of the matrix of the given SVD without some of its columns.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        columns: as in `set_columns`, static, fewer than n.

    Returns:
        `SVD` of u [..., m, q], s [..., q], vt [..., q, n - k], q = min(r, n - k), in
        the compute dtype. Singular values that vanish with the columns are zero.

    Raises:
        TypeError: arguments of the wrong kind, or indices that are traced.
        ValueError: an index out of range or repeated, or no column remains.

    Cost: O((m + n) r²) flops.

    Accuracy: exact to rounding of the matrix before the removal.

    Gradients: as `recompress`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])), 3)
        >>> jlora.updates.remove_columns(svd, 1).s.round(4).tolist()
        [3.0, 2.0]
    """
    u, s, vt = check_svd(svd)
    n = vt.shape[-1]
    indices = check_columns(columns, n)
    if isinstance(indices, Tracer):
        raise TypeError(
            "`columns` must be static, got a traced array: the shape of the result "
            "depends on how many there are. Pass Python integers or a NumPy array."
        )
    if len(indices) == n:
        raise ValueError(
            f"`columns` must leave at least one of {n} columns, got all of them. "
            "Name fewer."
        )

    kept = np.delete(np.arange(n), indices)
    rank = min(s.shape[-1], len(kept))
    return decompose_product(u, s[..., None] * _take_columns(vt, kept), rank)


@jax.jit
@follow_axes("*b r n", None, result="*b r n")
def _take_columns(
    v: Float[Array, "*batch r n"], indices: Int[Array, " k"]
) -> Float[Array, "*batch r k"]:
    return v[..., indices]
