"""Factors applied to activations: x base + scale * (x u) v."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import common_dtype, matmul_activations


def apply_factors(
    x, factors, base=None, *, scale=1.0, num_columns=None, implementation=None
):
    """Return x @ base + scale * (x @ u) @ v, never forming u @ v.

    Shapes: t rows of x, m inputs, n outputs, r rank; batch axes broadcast as in a matmul.

    Args:
        x: [..., t, m] or [m], real floating.
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: [..., m, n] real floating. None: no base.
        scale: number or scalar array, static or traced.
        num_columns: static k: only the last k columns of v are trained; the others are constants, to
            which no gradient is computed. None: all.
        implementation: static; there is one, "plain". None: that.

    Returns:
        [..., t, n] (or [n]) in the common dtype of x and base; without a base, of x, u and v.

    Raises:
        TypeError: arrays of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: 2 t m n + 2 t r (m + n) flops. Backward as much for x, and 2 t r m for u, 2 t r n (or
        2 t r k) for v, where they are asked for.

    Accuracy: that of x @ base at the caller's `jax.default_matmul_precision`. Factors wider than
        x are rounded to its dtype first, as in any mixed-precision layer; sums are accumulated
        in float32.

    Gradients: exact, to x, u, v, base and scale; no m×n gradient of the delta is formed. With
        `num_columns`, zero to the columns of v before them.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> jlora.apply_factors(jnp.ones((1, 3)), factors, jnp.zeros((3, 2))).tolist()
        [[3.0, 3.0]]
    """
    _checks.check_choice(implementation, (None, "plain"), "implementation")
    x = _checks.check_array(x, "x")
    u, v = _checks.check_factors(factors)
    if base is not None:
        base = _checks.check_base(base, (*u.shape[:-1], v.shape[-1]))
    if x.ndim == 0 or x.shape[-1] != u.shape[-2]:
        raise ValueError(
            f"`x` must have shape [..., {u.shape[-2]}] (the rows of u), got {x.shape}. "
            "Check the orientation of the weight."
        )
    if num_columns is not None:
        num_columns = _checks.check_integer(
            num_columns, "num_columns", maximum=v.shape[-1]
        )
    return _apply(x, u, v, base, scale, num_columns)


@functools.partial(jax.jit, inline=True, static_argnames="num_columns")
def _apply(x, u, v, base, scale, num_columns):
    working, dtype = choose_dtypes(x, u, v, base)
    thin = matmul_activations(x.astype(working), u.astype(working))
    # The scale goes on the thin product: on the t×n side it costs a pass, and one more backward.
    thin = (thin * jnp.asarray(scale, thin.dtype)).astype(working)
    delta = _expand(thin, v.astype(working), num_columns)
    if base is None:
        return delta.astype(dtype)
    plain = matmul_activations(x.astype(working), base.astype(working))
    return (plain + delta).astype(dtype)


def _expand(thin, v, num_columns):
    """Return thin @ v; where only some columns are trained, in two parts, of which one is."""
    if num_columns in (None, v.shape[-1]):
        return matmul_activations(thin, v)
    # As one product its gradient would be computed for all columns, and then cut.
    fixed, trained = jax.lax.stop_gradient(v[..., :-num_columns]), v[..., -num_columns:]
    parts = [matmul_activations(thin, part) for part in (fixed, trained)]
    return jnp.concatenate(parts, axis=-1)


def choose_dtypes(x, u, v, base):
    """Return the dtype that operands are rounded to, and that of the result."""
    if base is None:
        return x.dtype, common_dtype(x.dtype, u.dtype, v.dtype)
    working = common_dtype(x.dtype, base.dtype)
    return working, working
