"""Products with a quantised base, of which only a few rows are floats at any time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._numerics import common_dtype, matmul_activations
from jlora._types import AnyArray, Array, Float
from jlora.quantization.base import Encoded
from jlora.quantization.quantized_array import QuantizedArray

# Outputs whose weights are dequantised at a time: enough for an efficient product.
_BLOCK_ROWS = 256


def apply_quantized(
    x: Float[AnyArray, "... m"], base: QuantizedArray, *, is_transposed: bool = False
) -> Float[Array, "... n"]:
    """Return x @ base, dequantising the weights of some outputs at a time.

    No float copy of the base is made, neither here nor for the gradient, which
    dequantises the weights again. `apply_factors`, `linear` and `lift` call it.

    Args:
        x: activations [..., t, m]; batch axes as the base has them, or none for a base
            without.
        base: `QuantizedArray` of matrices [..., m, n], in any layout.
        is_transposed: static. True: multiply x [..., t, n] by the transposed matrices.

    Returns:
        [..., t, n], or transposed [..., t, m], in the common dtype of x and the base.

    Raises:
        TypeError: x is no floating array.
        ValueError: shapes that do not fit.

    Cost: 2 t m n flops, and about 3 operations for each weight. Backward the same.

    Accuracy: as x @ base.dequantize() in that dtype.

    Gradients: to x. The base is a constant: its gradient is zero.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> base = jlora.quantization.quantize(jnp.eye(2), "int8")
        >>> jlora.reconstruction.apply_quantized(jnp.ones((1, 2)), base).tolist()
        [[1.0, 1.0]]
    """
    x = jnp.asarray(x)
    size, batch = base.num_inputs, base.codes.shape[:-2]
    if is_transposed:
        size = base.num_outputs
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`x` must be a floating array, got {x.dtype}. Cast it.")
    if x.shape[-1:] != (size,) or (batch and x.shape[:-2] != batch):
        expected = ", ".join(map(str, (*batch, "t", size)))
        raise ValueError(
            f"`x` must have shape [{expected}] (batch axes and inputs of the base), "
            f"got {x.shape}. Check the orientation of the weight."
        )
    dtype = common_dtype(x.dtype, base.dtype)
    return _apply(x.astype(dtype), base, is_transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _apply(x: Array, base: QuantizedArray, is_transposed: bool) -> Array:
    multiply = _multiply_transposed if is_transposed else _multiply
    return _map_batch(multiply, x, base)


def _apply_forward(
    x: Array, base: QuantizedArray, is_transposed: bool
) -> tuple[Array, QuantizedArray]:
    return _apply(x, base, is_transposed), base


def _apply_backward(
    is_transposed: bool, base: QuantizedArray, gradient: Array
) -> tuple[Array, QuantizedArray]:
    return _apply(gradient, base, not is_transposed), _make_zeros(base)


_apply.defvjp(_apply_forward, _apply_backward)


def _make_zeros(base: QuantizedArray) -> QuantizedArray:
    """Return the gradient of a constant: zeros, and nothing for integers."""

    def zeros(leaf: Array) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zeros, base)


def _map_batch(multiply: Callable[..., Array], x: Array, base: QuantizedArray) -> Array:
    """Return the products of activations with each matrix of a stack."""
    from jlora.quantization.scales import read_scales  # on use, as the formats

    encoded = Encoded(base.codes, read_scales(base.scales), base.zeros)
    run = functools.partial(_run_rows, multiply, base=base)
    for _ in base.codes.shape[:-2]:
        run = jax.vmap(run)
    return run(x, encoded)


def _run_rows(
    multiply: Callable[..., Array], x: Array, encoded: Encoded, base: QuantizedArray
) -> Array:
    """Return the product of all activations with one matrix."""
    flat = x.reshape(-1, x.shape[-1])
    product = multiply(flat, encoded, base)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _multiply(x: Array, encoded: Encoded, base: QuantizedArray) -> Array:
    """Return x @ rowsᵀ, [t, n], block by block of rows."""
    num_rows = encoded.codes.shape[-2]

    def multiply_block(start: Any, size: int) -> Array:
        rows = _decode_rows(encoded, base, start, size, x.dtype)
        return matmul_activations(x, rows.T).astype(x.dtype)

    def write(index: Array, y: Array) -> Array:
        start = index * _BLOCK_ROWS
        block = multiply_block(start, _BLOCK_ROWS)
        return jax.lax.dynamic_update_slice(y, block, (0, start))

    if num_rows <= _BLOCK_ROWS:
        return multiply_block(0, num_rows)
    num_blocks, num_left = divmod(num_rows, _BLOCK_ROWS)
    y = jnp.zeros((len(x), num_rows), x.dtype)
    y = jax.lax.fori_loop(0, num_blocks, write, y)
    if not num_left:
        return y
    start = num_blocks * _BLOCK_ROWS
    return y.at[:, start:].set(multiply_block(start, num_left))


def _multiply_transposed(g: Array, encoded: Encoded, base: QuantizedArray) -> Array:
    """Return g @ rows, [t, m], summed block by block of rows in at least float32."""
    num_rows = encoded.codes.shape[-2]
    working = jnp.promote_types(g.dtype, jnp.float32)

    def multiply_block(start: Any, size: int) -> Array:
        rows = _decode_rows(encoded, base, start, size, g.dtype)
        part = jax.lax.dynamic_slice_in_dim(g, start, size, axis=1)
        return matmul_activations(part, rows).astype(working)

    def add(index: Array, total: Array) -> Array:
        return total + multiply_block(index * _BLOCK_ROWS, _BLOCK_ROWS)

    num_blocks, num_left = divmod(num_rows, _BLOCK_ROWS)
    total = jnp.zeros((len(g), base.num_inputs), working)
    if num_blocks:
        total = jax.lax.fori_loop(0, num_blocks, add, total)
    if num_left:
        total = total + multiply_block(num_blocks * _BLOCK_ROWS, num_left)
    return total.astype(g.dtype)


def _decode_rows(
    encoded: Encoded, base: QuantizedArray, start: Any, size: int, dtype: Any
) -> Float[Array, "size m"]:
    """Return the weights of some outputs."""
    part = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, size, axis=0), encoded
    )
    return base.format.decode(part, base.num_inputs).astype(dtype)
