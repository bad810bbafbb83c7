"""Products with a quantised base that never make a float copy of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._numerics import common_dtype, matmul_activations, thin_dtype
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float
from jlora.factors import Factors
from jlora.quantization.base import Encoded
from jlora.quantization.quantized_array import QuantizedArray
from jlora.reconstruction.quantized_blocks import (
    Thin,
    multiply_blocks,
    multiply_transposed_blocks,
)


def apply_quantized(
    x: Float[AnyArray, "... m"],
    base: QuantizedArray,
    factors: Factors | None = None,
    *,
    num_columns: int | None = None,
    is_transposed: bool = False,
) -> Float[Array, "... n"]:
    """Return x @ base + (x @ u) @ v without a float copy of the base.

    The weights of some outputs are dequantised at a time, and again for the gradient.
    `apply_factors`, `linear` and `lift` call it.

    Args:
        x: activations [..., t, m]; batch axes as the base has them, or none for a base
            without.
        base: `QuantizedArray` of matrices [..., m, n], in any layout.
        factors: u [..., m, r], v [..., r, n] with the batch axes of the base, the scale
            multiplied into one of them. None: only x @ base.
        num_columns: static k: only the last k columns of v are trained. None: all.
        is_transposed: static. True: multiply x [..., t, n] by the transposed matrices;
            u then is [..., n, r], and v [..., r, m].

    Returns:
        [..., t, n], or transposed [..., t, m], in the common dtype of x and the base.

    Raises:
        TypeError: x is no floating array.
        ValueError: shapes that do not fit.

    Cost: 2 t m n flops, and about 3 operations for each weight. Backward the same.

    Accuracy: as x @ base.dequantize() + (x @ u) @ v in that dtype, rounded once.

    Gradients: to x, u and v. The base is a constant: its gradient is zero.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantization.quantize(jnp.eye(2), "int8")
        >>> jlora.reconstruction.apply_quantized(jnp.ones((1, 2)), base).tolist()
        [[1.0, 1.0]]
    """
    x = jnp.asarray(x)
    sizes, batch = (base.num_inputs, base.num_outputs), base.codes.shape[:-2]
    num_summed, num_kept = sizes[::-1] if is_transposed else sizes
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be a floating array, got {x.dtype}. Cast it.")
    if x.shape[-1:] != (num_summed,) or (batch and x.shape[:-2] != batch):
        expected = ", ".join(map(str, (*batch, "t", num_summed)))
        raise ValueError(
            f"`x` must have shape [{expected}] (batch axes and inputs of the base), "
            f"got {x.shape}. Check the orientation of the weight."
        )
    if factors is not None:
        _check_factors(factors, (*batch, num_summed, num_kept))

    dtype = common_dtype(x.dtype, base.dtype)
    if factors is not None:
        u, v = factors
        factors = Factors(u.astype(dtype), v.astype(thin_dtype(dtype)))
    if num_columns == num_kept:
        num_columns = None
    # Codes are stored as [..., n, bytes of m].
    m, n = ("n", "m") if is_transposed else ("m", "n")
    of_factors = None if factors is None else (f"*b {m} r", f"*b r {n}")
    axes = f"*x {m}", "*b n m", of_factors
    run = follow_axes(*axes, result=f"*x {n}")(_apply)
    return run(x.astype(dtype), base, factors, num_columns, is_transposed)


def _check_factors(factors: Factors, shape: tuple[int, ...]) -> None:
    *batch, m, n = shape
    (*u_batch, rows, rank), (*v_batch, v_rank, columns) = (p.shape for p in factors)
    if (u_batch, v_batch, rows, columns, v_rank) != (batch, batch, m, n, rank):
        expected = [", ".join(map(str, (*batch, *end))) for end in ((m, "r"), ("r", n))]
        raise ValueError(
            f"`factors` must have shapes [{expected[0]}] and [{expected[1]}], as the "
            f"base, got {factors.u.shape} and {factors.v.shape}. Check the orientation "
            "of the weight."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _apply(
    x: Array,
    base: QuantizedArray,
    factors: Factors | None,
    num_columns: int | None,
    is_transposed: bool,
) -> Array:
    return _apply_forward(x, base, factors, num_columns, is_transposed)[0]


def _apply_forward(
    x: Array,
    base: QuantizedArray,
    factors: Factors | None,
    num_columns: int | None,
    is_transposed: bool,
) -> tuple[Array, tuple]:
    thin = None if factors is None else _multiply_thin(x, factors.u)
    y = _sum_products(x, base, thin, factors and factors.v, is_transposed)
    return y, (x, base, factors, thin)


def _apply_backward(
    num_columns: int | None, is_transposed: bool, saved: tuple, gradient: Array
) -> tuple[Array, QuantizedArray, Factors | None]:
    x, base, factors, thin = saved
    if factors is None:
        dx = _sum_products(gradient, base, None, None, not is_transposed)
        return dx, _make_zeros(base), None

    u, v = factors
    d_thin = matmul_activations(gradient, v.mT.astype(gradient.dtype)).astype(v.dtype)
    dx = _sum_products(gradient, base, d_thin, u.mT, not is_transposed)
    du = _multiply_rows(x, d_thin, base).astype(u.dtype)

    # No gradient of the frozen columns is computed.
    num_frozen = 0 if num_columns is None else v.shape[-1] - num_columns
    dv = _multiply_rows(thin, gradient[..., num_frozen:], base).astype(v.dtype)
    if num_frozen:
        padding = [(0, 0)] * (dv.ndim - 1) + [(num_frozen, 0)]
        dv = jnp.pad(dv, padding)
    return dx, _make_zeros(base), Factors(du, dv)


_apply.defvjp(_apply_forward, _apply_backward)


def _multiply_thin(x: Array, u: Array) -> Array:
    """Return x @ u in the dtype in which v multiplies it."""
    return matmul_activations(x, u).astype(thin_dtype(x.dtype))


def _multiply_rows(x: Array, g: Array, base: QuantizedArray) -> Array:
    """Return xᵀ @ g, summed over all axes but the batch axes of the base."""
    batch = base.codes.shape[:-2]
    dtype = common_dtype(x.dtype, g.dtype)
    flat = (part.reshape(*batch, -1, part.shape[-1]).astype(dtype) for part in (x, g))
    left, right = flat
    return matmul_activations(left.mT, right)


def _make_zeros(base: QuantizedArray) -> QuantizedArray:
    """Return the gradient of a constant: zeros, and nothing for integers."""

    def zeros(leaf: Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zeros, base)


def _sum_products(
    x: Array,
    base: QuantizedArray,
    p: Array | None,
    q: Array | None,
    is_transposed: bool,
) -> Array:
    """Return x @ base + p @ q, or with the transposed base, for each matrix."""
    from jlora.quantization.scales import read_scales  # on use, as the formats

    encoded = Encoded(base.codes, read_scales(base.scales), base.zeros)
    multiply = multiply_transposed_blocks if is_transposed else multiply_blocks

    def run_matrix(
        x: Array, encoded: Encoded, p: Array | None, q: Array | None
    ) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        thin = None
        if p is not None and q is not None:
            thin = Thin(p.reshape(-1, p.shape[-1]).astype(q.dtype), q)
        y = multiply(flat, encoded, base, thin)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    run = run_matrix
    for _ in base.codes.shape[:-2]:
        run = jax.vmap(run)
    return run(x, encoded, p, q)
