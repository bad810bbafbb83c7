"""The weight put together again: base + scale * u @ v."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import common_dtype, compute_dtype, matmul


def reconstruct(factors, base=None, *, scale=1.0, columns=None, dtype=None):
    """Return base + scale * u @ v, or scale * u @ v without a base.

    Shapes: m, n rows and columns, r rank, k columns recomputed.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: [..., m, n] real floating. None: no base.
        scale: number or scalar array, static or traced.
        columns: which columns to compute: an integer k (static: the last k), a slice, or a 1-D
            array of k distinct indices; k·m work. The others are those of `base`; without a
            base the k columns come back alone, [..., m, k]. None: all of them.
        dtype: dtype of the result. None: that of `base`, or the common one of u and v.

    Returns:
        [..., m, n] (or [..., m, k], see `columns`).

    Raises:
        TypeError: arrays or indices of the wrong kind.
        ValueError: shapes that do not fit, or columns out of range or named twice.

    Cost: 2 m n r flops, one pass over the weight. To update a weight in place, donate it:
        jax.jit(lambda w, f: reconstruct(f, w), donate_argnums=0).

    Accuracy: computed in at least float32 and rounded once to the result's dtype.

    Gradients: exact, to u, v, base and scale.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]]))
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), scale=2.0).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), columns=1).tolist()
        [[0.0, 0.0, 3.0], [0.0, 0.0, 3.0]]
    """
    u, v = _checks.check_factors(factors)
    if base is not None:
        base = _checks.check_matrix(base, "base")
        expected = (*u.shape[:-1], v.shape[-1])
        _checks.check_shape(base.shape, expected, "base", "that of u @ v")
    if dtype is None:
        dtype = common_dtype(u.dtype, v.dtype) if base is None else base.dtype
    if columns is not None:
        columns = jnp.asarray(_checks.check_columns(columns, v.shape[-1]))
    return _reconstruct(u, v, base, scale, columns, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames="dtype")
def _reconstruct(u, v, base, scale, columns, dtype):
    if columns is None:
        return _sum(u, v, base, scale, dtype)
    kept = None if base is None else base[..., columns]
    block = _sum(u, v[..., columns], kept, scale, dtype)
    return block if base is None else base.astype(dtype).at[..., columns].set(block)


def _sum(u, v, base, scale, dtype):
    compute = compute_dtype(u.dtype, v.dtype, *(() if base is None else (base.dtype,)))
    # The scale goes on a thin factor: on the product it costs one more pass over m×n.
    thin = u.astype(compute) * jnp.asarray(scale, compute)
    delta = matmul(thin, v.astype(compute))
    total = delta if base is None else base.astype(compute) + delta
    return total.astype(dtype)
