"""Checks of arguments that several files share, and the messages of their errors.

Each function returns the checked value, or returns None if there is nothing to convert.
A rule that only one file needs is checked in that file.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._types import AnyArray, Array, Float, PRNGKey, Scalar

T = TypeVar("T")

_FLOATING = tuple(map(np.dtype, (jnp.float16, jnp.bfloat16, np.float32, np.float64)))

# u [*batch, m, r] and v [*batch, r, n]. `Factors` is such a pair.
Pair: TypeAlias = tuple[Float[AnyArray, "*batch m r"], Float[AnyArray, "*batch r n"]]
CheckedPair: TypeAlias = tuple[Float[Array, "*batch m r"], Float[Array, "*batch r n"]]


def check_matrix(
    a: Float[AnyArray, "*batch m n"], name: str = "a", *, min_ndim: int = 2
) -> Float[Array, "*batch m n"]:
    """Return `a` as a JAX array of matrices with a real floating dtype."""
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


def check_array(a: Float[AnyArray, "*shape"], name: str) -> Float[Array, "*shape"]:
    """Return `a` as a JAX array with a real floating dtype."""
    return jnp.asarray(check_floating(a, name))


def check_floating(a: Any, name: str) -> Any:
    """Return `a` itself, an array of any kind with a real floating dtype."""
    dtype = getattr(a, "dtype", None)
    is_array = hasattr(a, "shape") and not isinstance(a, np.ma.MaskedArray)
    if not (is_array and isinstance(dtype, np.dtype)):
        raise TypeError(
            f"`{name}` must be a NumPy or JAX array, got {type(a).__name__}. "
            "Wrap it with jnp.asarray."
        )
    if not is_floating(dtype):
        # float8 and long double are no dtype to compute in; nor is a foreign byte order
        widths = " of 16 to 64 bits" if jnp.issubdtype(dtype, jnp.floating) else ""
        raise TypeError(
            f"`{name}` must have a real floating dtype{widths}, got {dtype}. "
            "Cast it, for example with .astype(jnp.float32)."
        )
    return a


def is_floating(dtype: Any) -> bool:
    """Return whether jlora computes with arrays of this dtype."""
    return dtype in _FLOATING


def check_finite(a: Float[AnyArray, ...], name: str, *, xp: ModuleType = jnp) -> None:
    """Refuse an array with NaN or Inf. A traced array passes: it has no values yet.

    `xp` is the module that reads the values. jnp casts a NumPy array to the dtype that
    JAX computes in: without x64, a float64 value above 3.4e38 counts as Inf. np does
    not.
    """
    if isinstance(a, Tracer):
        return
    num_bad = int(xp.sum(~xp.isfinite(a)))
    if num_bad:
        raise ValueError(
            f"`{name}` must be finite, got {num_bad} NaN or Inf among {a.size} values. "
            "Repair it or leave it out."
        )


def check_integer(
    value: Any, name: str, *, minimum: int = 1, maximum: int | None = None
) -> int:
    """Return `value` as a static int in [minimum, maximum]."""
    if isinstance(value, Tracer):
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
            f"`{name}` must be an integer, got {value!r}. "
            "Round it to a whole number first."
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


def check_scalar(
    value: Any, name: str, *, minimum: float | int | None = None
) -> Scalar:
    """Return `value`, one real number, as a Python float or an unchanged scalar array.

    A value below `minimum`, and NaN beside one, is refused unless it is traced.
    """
    number: Any = value
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)):
        number = float(value)
    elif not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(
            f"`{name}` must be a real number or a scalar array, got "
            f"{type(value).__name__}. Pass a float."
        )
    elif not (
        jnp.issubdtype(value.dtype, jnp.floating)
        or jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise TypeError(
            f"`{name}` must be a real number or a scalar array, got dtype "
            f"{value.dtype}. Pass a float."
        )
    elif value.shape != ():
        raise ValueError(
            f"`{name}` must be a number or a scalar array, got shape {value.shape}. "
            "Use jax.vmap for one number per matrix."
        )

    is_known = not isinstance(value, Tracer)
    if minimum is not None and is_known and not number >= minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}, got {value}. Choose a larger value."
        )
    return number


def check_interval(
    value: float | int,
    name: str,
    lower: float | int,
    upper: float | int,
    *,
    closed: Literal["left", "right", "neither"],
    advice: str,
) -> None:
    """Refuse NaN, and a number outside of the interval from `lower` to `upper`.

    `closed` names the end that belongs to it; `advice` is the message's last sentence.
    """
    is_above = lower <= value if closed == "left" else lower < value
    is_below = value <= upper if closed == "right" else value < upper
    if not (is_above and is_below):
        left = "[" if closed == "left" else "("
        right = "]" if closed == "right" else ")"
        raise ValueError(
            f"`{name}` must lie in {left}{lower}, {upper}{right}, got {value}. {advice}"
        )


def check_rank(rank: int, shape: Sequence[int], name: str = "rank") -> int:
    """Return `rank` as an int in [1, min(m, n)] for a matrix of `shape` [..., m, n]."""
    limit = min(shape[-2:])
    rank = check_integer(rank, name)
    if rank > limit:
        raise ValueError(
            f"`{name}` must be at most min(m, n) = {limit} for a matrix of shape "
            f"{tuple(shape)}, got {rank}. Choose a smaller rank."
        )
    return rank


def check_factors(factors: Pair, name: str = "factors") -> CheckedPair:
    """Return the two arrays of `factors` after a check that u @ v is defined."""
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


def check_base(
    base: Float[AnyArray, "*batch m n"], shape: Sequence[int], name: str = "base"
) -> Float[Array, "*batch m n"]:
    """Return `base` as a JAX array of the given `shape`, the shape of u @ v."""
    base = check_matrix(base, name)
    check_shape(base.shape, shape, name, "the shape of u @ v")
    return base


def check_pairs(
    factors: Sequence[
        tuple[Float[AnyArray, "*batch m _"], Float[AnyArray, "*batch _ n"]]
    ],
) -> list[tuple[Float[Array, "*batch m _"], Float[Array, "*batch _ n"]]]:
    """Return [(u, v)] for factors of one product shape; the ranks may differ."""
    pairs = [check_factors(pair, f"factors[{i}]") for i, pair in enumerate(factors)]
    if not pairs:
        raise ValueError(
            "`factors` must hold at least one pair, got none. Pass Factors(u, v)."
        )

    (first_u, first_v), *others = pairs
    for i, (u, v) in enumerate(others, start=1):
        rank = u.shape[-1]
        u_shape = (*first_u.shape[:-1], rank)
        v_shape = (*first_v.shape[:-2], rank, first_v.shape[-1])
        check_shape(u.shape, u_shape, f"factors[{i}].u", "the rows of factors[0]")
        check_shape(v.shape, v_shape, f"factors[{i}].v", "the columns of factors[0]")
    return pairs


def check_shape(
    shape: Sequence[int], expected: Sequence[int], name: str, meaning: str
) -> None:
    """Refuse a `shape` that differs from `expected`; `meaning` explains the latter."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"`{name}` must have shape {tuple(expected)} ({meaning}), "
            f"got {tuple(shape)}. Check its orientation and size."
        )


def check_choice(value: T, choices: Collection[T], name: str) -> T:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(
            f"`{name}` must be one of {listed}, got {value!r}. Choose one."
        )
    return value


def check_key(key: PRNGKey, name: str = "key") -> PRNGKey:
    """Return `key` if it is one typed PRNG key."""
    if _is_legacy_key(key):
        raise TypeError(
            f"`{name}` must be a typed PRNG key, got a legacy uint32 key. Make one "
            "with jax.random.key(seed), or wrap it with jax.random.wrap_key_data."
        )
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


def _is_legacy_key(key: Any) -> bool:
    """Return whether `key` looks like one, or a batch, of jax.random.PRNGKey."""
    if getattr(key, "dtype", None) != np.uint32:
        return False
    return key.shape[-1:] in ((2,), (4,))  # the words of threefry and of rbg
