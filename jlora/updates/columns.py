"""Columns of the factors put in place of others."""

from jlora import _checks
from jlora.factors import Factors


def set_columns(factors, columns, values):
    """Return the factors with v[..., columns] = values: a domain's weight vectors in V.

    Only these columns of u @ v change; they become u @ values.

    Shapes: m, n rows and columns of u @ v, r rank, k columns set.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        columns: an integer k (static: the last k columns), a slice, or a 1-D array of k
            distinct indices. Indices that are traced are not checked, and those out of range
            are dropped.
        values: [..., r, k] real floating, cast to the dtype of v. Batch axes as v, or none.

    Returns:
        `Factors` in the dtypes given.

    Raises:
        TypeError: factors, indices or values of the wrong kind.
        ValueError: an index out of range or named twice, or `values` of another shape.

    Gradients: exact, to u, to the columns of v that stay, and to `values`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.zeros((1, 4)))
        >>> jlora.set_columns(factors, 2, jnp.array([[7.0, 8.0]])).v.tolist()
        [[0.0, 0.0, 7.0, 8.0]]
    """
    u, v = _checks.check_factors(factors)
    values = _checks.check_matrix(values, "values")
    indices = _checks.check_columns(columns, v.shape[-1])
    batch = v.shape[:-2] if values.ndim > 2 else ()
    expected = (*batch, v.shape[-2], len(indices))
    _checks.check_shape(values.shape, expected, "values", "rank rows, one column for each set")
    return Factors(u, v.at[..., indices].set(values.astype(v.dtype)))
