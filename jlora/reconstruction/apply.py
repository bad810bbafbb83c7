"""Factors applied to activations: x base + scale * (x u) v."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import common_dtype, matmul_activations


def apply_factors(x, factors, base=None, *, scale=1.0):
    """Return x @ base + scale * (x @ u) @ v, never forming u @ v.

    Shapes: t rows of x, m inputs, n outputs, r rank; batch axes broadcast as in a matmul.

    Args:
        x: [..., t, m] or [m], real floating.
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: [..., m, n] real floating. None: no base.
        scale: number or scalar array, static or traced.

    Returns:
        [..., t, n] (or [n]) in the common dtype of x and base; without a base, of x, u and v.

    Raises:
        TypeError: arrays of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: 2 t m n + 2 t r (m + n) flops.

    Accuracy: that of x @ base at the caller's `jax.default_matmul_precision`. Factors wider than
        x are rounded to its dtype first, as in any mixed-precision layer; sums are accumulated
        in float32.

    Gradients: exact, to x, u, v, base and scale; no m×n gradient of the delta is formed.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> jlora.apply_factors(jnp.ones((1, 3)), factors, jnp.zeros((3, 2))).tolist()
        [[3.0, 3.0]]
    """
    x = _checks.check_array(x, "x")
    u, v = _checks.check_factors(factors)
    if base is not None:
        base = _checks.check_matrix(base, "base")
        expected = (*u.shape[:-1], v.shape[-1])
        _checks.check_shape(base.shape, expected, "base", "that of u @ v")
    if x.ndim == 0 or x.shape[-1] != u.shape[-2]:
        raise ValueError(
            f"`x` must have shape [..., {u.shape[-2]}] (the rows of u), got {x.shape}. "
            "Check the orientation of the weight."
        )
    return _apply(x, u, v, base, scale)


@functools.partial(jax.jit, inline=True)
def _apply(x, u, v, base, scale):
    working = x.dtype if base is None else common_dtype(x.dtype, base.dtype)
    dtype = common_dtype(working, u.dtype, v.dtype) if base is None else working
    thin = matmul_activations(x.astype(working), u.astype(working))
    # The scale goes on the thin product: on the t×n side it costs a pass, and one more backward.
    thin = (thin * jnp.asarray(scale, thin.dtype)).astype(working)
    delta = matmul_activations(thin, v.astype(working))
    if base is None:
        return delta.astype(dtype)
    plain = matmul_activations(x.astype(working), base.astype(working))
    return (plain + delta).astype(dtype)
