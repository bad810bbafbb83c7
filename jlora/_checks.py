"""Every rule about arguments, and the sentence that says it was broken."""

import operator

import jax
import jax.numpy as jnp
import numpy as np


def check_matrix(a, name="a", *, min_ndim=2):
    """Return `a` as a JAX array of shape [..., m, n] with a real floating dtype."""
    a = check_array(a, name)
    if a.ndim < min_ndim:
        raise ValueError(
            f"`{name}` must have at least {min_ndim} axes, got shape {a.shape}. "
            "Reshape it to [..., rows, columns]."
        )
    if a.shape[-1] == 0 or a.shape[-2] == 0:
        raise ValueError(
            f"`{name}` must have at least one row and one column, got shape {a.shape}. "
            "Leave empty weights out."
        )
    return a


def check_array(a, name):
    """Return `a` as a JAX array with a real floating dtype."""
    return jnp.asarray(check_floating(a, name))


def check_floating(a, name):
    """Return `a` as it is, a NumPy or JAX array with a real floating dtype."""
    if not (hasattr(a, "shape") and hasattr(a, "dtype")):
        raise TypeError(
            f"`{name}` must be a NumPy or JAX array, got {type(a).__name__}. "
            "Wrap it with jnp.asarray."
        )
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must have a real floating dtype, got {a.dtype}. "
            "Cast it, for example with .astype(jnp.float32)."
        )
    return a


def check_finite(a, name):
    """Refuse an array with NaN or Inf in it; a traced one cannot be looked at and passes."""
    if isinstance(a, jax.core.Tracer):
        return
    num_bad = int(jnp.sum(~jnp.isfinite(a)))
    if num_bad:
        raise ValueError(
            f"`{name}` must be finite, got {num_bad} NaN or Inf among {a.size} values. "
            "Repair it or leave it out."
        )


def check_integer(value, name, *, minimum=1, maximum=None):
    """Return `value` as a static int in [minimum, maximum]."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be a static Python integer, got a traced value. "
            f"Mark it with jax.jit(..., static_argnames={name!r})."
        )
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}. Pass a number.")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer, got {value!r}. Round it to a whole number first."
        ) from None
    if value < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}, got {value}. Choose a larger value."
        )
    if maximum is not None and value > maximum:
        raise ValueError(
            f"`{name}` must be at most {maximum}, got {value}. Choose a smaller value."
        )
    return value


def check_rank(rank, shape, name="rank"):
    """Return `rank` as an int in [1, min(m, n)] for a matrix of `shape` [..., m, n]."""
    limit = min(shape[-2:])
    rank = check_integer(rank, name)
    if rank > limit:
        raise ValueError(
            f"`{name}` must be at most min(m, n) = {limit} for a matrix of shape "
            f"{tuple(shape)}, got {rank}. Choose a smaller rank."
        )
    return rank


def check_factors(factors, name="factors"):
    """Return the two arrays of `factors` after checking that u @ v is defined."""
    if not (isinstance(factors, tuple) and len(factors) == 2):
        raise TypeError(
            f"`{name}` must be a pair Factors(u, v), got {type(factors).__name__}. "
            "Build it with jlora.Factors or jlora.split_svd."
        )
    u = check_matrix(factors[0], f"{name}.u")
    v = check_matrix(factors[1], f"{name}.v")
    if u.shape[-1] != v.shape[-2] or u.shape[:-2] != v.shape[:-2]:
        raise ValueError(
            f"`{name}` must have u of shape [..., m, r] and v of shape [..., r, n], "
            f"got {u.shape} and {v.shape}. Check the orientation of both."
        )
    return u, v


def check_base(base, shape, name="base"):
    """Return `base` as a matrix of the shape that u @ v has."""
    base = check_matrix(base, name)
    check_shape(base.shape, shape, name, "that of u @ v")
    return base


def check_pairs(factors):
    """Return [(u, v)] of a sequence of factors of products of one size."""
    pairs = [check_factors(pair, f"factors[{i}]") for i, pair in enumerate(factors)]
    if not pairs:
        raise ValueError(
            "`factors` must hold at least one pair, got none. Pass Factors(u, v)."
        )
    (u, v), *others = pairs
    for i, (other_u, other_v) in enumerate(others, start=1):
        rank = other_u.shape[-1]
        expected = (*u.shape[:-1], rank)
        check_shape(
            other_u.shape, expected, f"factors[{i}].u", "the rows of factors[0]"
        )
        expected = (*v.shape[:-2], rank, v.shape[-1])
        check_shape(
            other_v.shape, expected, f"factors[{i}].v", "the columns of factors[0]"
        )
    return pairs


def check_shape(shape, expected, name, meaning):
    """Refuse a `shape` that is not exactly the expected one."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"`{name}` must have shape {tuple(expected)} ({meaning}), got {tuple(shape)}. "
            "Check its orientation and size."
        )


def check_choice(value, choices, name):
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}. Choose one."
        )
    return value


def check_key(key, name="key"):
    """Return `key` if it is one typed PRNG key."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"`{name}` must be a typed PRNG key, got {type(key).__name__}. "
            "Make one with jax.random.key(seed)."
        )
    if key.shape != ():
        raise ValueError(
            f"`{name}` must be a single key, got keys of shape {key.shape}. "
            "Use jax.vmap over the matrices and the keys together."
        )
    return key


def check_columns(columns, num_columns, name="columns"):
    """Return column indices [k]: an int means the last k, else a slice or a list of indices.

    Concrete indices are checked for range and repetition and come back as a NumPy array;
    traced ones cannot be, and come back as they are.
    """
    if isinstance(columns, slice):
        indices = np.arange(num_columns)[columns]
    elif isinstance(columns, jax.core.Tracer) and columns.ndim == 1:
        return _check_index_dtype(columns, name)
    elif np.ndim(columns) == 0:
        count = check_integer(columns, name, maximum=num_columns)
        return np.arange(num_columns - count, num_columns)
    else:
        indices = _check_index_dtype(np.asarray(columns), name)
    return _check_indices(indices, num_columns, name)


def _check_index_dtype(indices, name):
    if indices.ndim != 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be an integer k (the last k), a slice, or a 1-D array of integers, "
            f"got dtype {indices.dtype} of shape {indices.shape}. "
            "Convert a mask with np.flatnonzero."
        )
    return indices


def _check_indices(indices, num_columns, name):
    if indices.size == 0:
        raise ValueError(
            f"`{name}` must name at least one column, got none. Leave it out instead."
        )
    outside = indices[(indices < -num_columns) | (indices >= num_columns)]
    if outside.size:
        raise ValueError(
            f"`{name}` must lie in [-{num_columns}, {num_columns}), got {outside[0]}. "
            "Count the columns of the matrix."
        )
    indices = indices % num_columns
    if np.unique(indices).size != indices.size:
        raise ValueError(
            f"`{name}` must name each column once, got {indices.tolist()}. Remove the repetitions."
        )
    return indices
