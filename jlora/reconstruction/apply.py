"""Factors applied to activations: x base + scale * (x u) v."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import common_dtype, matmul_activations, thin_dtype
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, Scalar
from jlora.factors import Factors
from jlora.quantization.quantized_array import QuantizedArray
from jlora.reconstruction.quantized_products import apply_quantized


def apply_factors(
    x: Float[AnyArray, "... m"],
    factors: Factors,
    base: Float[AnyArray, "... m n"] | QuantizedArray | None = None,
    *,
    scale: Scalar = 1.0,
    num_columns: int | None = None,
) -> Float[Array, "... n"]:
    """Return x @ base + scale * (x @ u) @ v, never forming u @ v.

    Batch axes broadcast as in a matmul.

    Args:
        x: activations [..., t, m] or [m].
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: [..., m, n], or a `QuantizedArray`, which is dequantised in blocks and
            has no gradient. None: no base.
        scale: number or scalar array, static or traced.
        num_columns: static k: only the last k columns of v are trained; the others are
            constants, to which no gradient is computed. None: all.

    Returns:
        [..., t, n] (or [n]) in the common dtype of x and base; without a base, of x, u
        and v.

    Raises:
        TypeError: arrays of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: 2 t m n + 2 t r (m + n) flops. Backward the same for x, and 2 t r m for u,
        2 t r n (or 2 t r k) for v, if they are asked for.

    Accuracy: as x @ base at the caller's `jax.default_matmul_precision`. Factors wider
        than x are rounded to its dtype first, as in any mixed-precision layer; sums are
        accumulated in float32.

    Gradients: exact, to x, u, v, base and scale; no m×n gradient of the delta is
        formed. With `num_columns`, zero to the columns of v before them.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> jlora.apply_factors(jnp.ones((1, 3)), factors, jnp.zeros((3, 2))).tolist()
        [[3.0, 3.0]]
    """
    x = _checks.check_array(x, "x")
    u, v = _checks.check_factors(factors)
    scale = _checks.check_scalar(scale, "scale")
    if base is not None and not isinstance(base, QuantizedArray):
        base = _checks.check_base(base, (*u.shape[:-1], v.shape[-1]))

    if x.ndim == 0 or x.shape[-1] != u.shape[-2]:
        raise ValueError(
            f"`x` must have shape [..., {u.shape[-2]}] (the rows of u), got {x.shape}. "
            "Check the orientation of the weight."
        )
    if num_columns is not None:
        limit = v.shape[-1]
        num_columns = _checks.check_integer(num_columns, "num_columns", maximum=limit)
    return _apply(x, u, v, base, scale, num_columns)


@functools.partial(jax.jit, inline=True, static_argnames="num_columns")
def _apply(
    x: Array,
    u: Array,
    v: Array,
    base: Array | QuantizedArray | None,
    scale: Scalar,
    num_columns: int | None,
) -> Array:
    # A batch of weights may be broadcast against one x.
    result = "*x n" if x.ndim >= u.ndim else "*b _ n"
    of_base = None if isinstance(base, QuantizedArray) else "*b m n"
    arrays = "*x m", "*b m r", "*b r n", of_base, None
    run = follow_axes(*arrays, result=result)(_apply_automatic)
    return run(x, u, v, base, scale, num_columns)


def _apply_automatic(
    x: Array,
    u: Array,
    v: Array,
    base: Array | QuantizedArray | None,
    scale: Scalar,
    num_columns: int | None,
) -> Array:
    working, dtype = choose_dtypes(x, u, v, base)
    x = x.astype(working)
    if isinstance(base, QuantizedArray):
        factors = Factors(u * jnp.asarray(scale, u.dtype), v)
        return _apply_quantized(x, factors, base, num_columns)
    thin = matmul_activations(x, u.astype(working))
    # Scale the thin product: on the t×n side it would cost a pass, and one more
    # backward.
    thin = (thin * jnp.asarray(scale, thin.dtype)).astype(thin_dtype(working))
    delta = _expand(thin, v.astype(thin.dtype), num_columns)

    if base is None:
        return delta.astype(dtype)
    return (matmul_activations(x, base.astype(working)) + delta).astype(dtype)


def _apply_quantized(
    x: Array, factors: Factors, base: QuantizedArray, num_columns: int | None
) -> Array:
    """Return the sum, in one pass over the base unless the factors are more than it."""
    if factors.u.ndim == base.codes.ndim:
        return apply_quantized(x, base, factors, num_columns=num_columns)
    plain = apply_quantized(x, base)
    delta = apply_factors(x, factors, num_columns=num_columns)
    return plain + delta.astype(plain.dtype)


def _expand(
    thin: Float[Array, "... r"], v: Float[Array, "... r n"], num_columns: int | None
) -> Float[Array, "... n"]:
    """Return thin @ v, in two parts if only some columns are trained.

    One product would have its gradient computed for all columns, and then sliced.
    """
    if num_columns in (None, v.shape[-1]):
        return matmul_activations(thin, v)
    fixed = jax.lax.stop_gradient(v[..., :-num_columns])
    trained = v[..., -num_columns:]
    parts = [matmul_activations(thin, part) for part in (fixed, trained)]
    return jnp.concatenate(parts, axis=-1)


def choose_dtypes(
    x: Array, u: Array, v: Array, base: Array | QuantizedArray | None
) -> tuple[Any, Any]:
    """Return the dtype that operands are cast to, and the dtype of the result."""
    if base is None:
        return x.dtype, common_dtype(x.dtype, u.dtype, v.dtype)
    working = common_dtype(x.dtype, base.dtype)
    return working, working
