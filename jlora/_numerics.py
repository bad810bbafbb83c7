"""Products at a stated precision, the compute dtype, norms, and safe division."""

from __future__ import annotations

from typing import NoReturn, overload

import jax
import jax.numpy as jnp

from jlora._types import Array, Bool, DTypeLike, Float


def common_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the dtype that holds all given ones, also under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        # Canonicalise first: without x64, float64 of NumPy would raise a warning.
        return jnp.result_type(*map(jax.dtypes.canonicalize_dtype, dtypes))


def compute_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in: the widest given, and at least float32."""
    return common_dtype(jnp.float32, *dtypes)


@overload
def to_compute(array: Float[Array, ...], /) -> Float[Array, ...]: ...


@overload
def to_compute(
    first: Float[Array, ...],
    second: Float[Array, ...],
    /,
    *arrays: Float[Array, ...],
) -> tuple[Float[Array, ...], ...]: ...


def to_compute(
    *arrays: Float[Array, ...],
) -> Float[Array, ...] | tuple[Float[Array, ...], ...]:
    """Return `arrays` in their common compute dtype; one array is returned bare."""
    dtype = compute_dtype(*(array.dtype for array in arrays))
    cast = tuple(array.astype(dtype) for array in arrays)
    return cast[0] if len(cast) == 1 else cast


def matmul(
    a: Float[Array, "... m k"], b: Float[Array, "... k n"]
) -> Float[Array, "... m n"]:
    """Return a @ b in full precision: never TF32 on a GPU, never bfloat16 on a TPU."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def matmul_activations(
    x: Float[Array, "... m"], w: Float[Array, "... m n"]
) -> Float[Array, "... n"]:
    """Return x @ w for model activations, accumulated in at least float32.

    `jax.default_matmul_precision` decides the precision of float32 operands, so an
    adapted layer computes like the plain layer beside it.
    """
    accumulator = compute_dtype(x.dtype, w.dtype)
    return jnp.matmul(x, w, precision=None, preferred_element_type=accumulator)


def safe_divide(
    numerator: Float[Array, ...], denominator: Float[Array, ...]
) -> Float[Array, ...]:
    """Return numerator / denominator, and 0 where the denominator is 0.

    The inner `where` keeps the derivative finite: 0 * inf would make it NaN.
    """
    is_zero = denominator == 0
    quotient = numerator / jnp.where(is_zero, jnp.ones_like(denominator), denominator)
    return jnp.where(is_zero, jnp.zeros_like(quotient), quotient)


def power_of_two_scale(a: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    """Return the smallest power of two above max|a| for each matrix.

    Division by it is exact, and keeps the squares inside a Gram matrix from overflow
    and underflow at scales like 1e±15. For a zero or nonfinite matrix it is 2.
    """
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    is_usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(is_usable, largest, jnp.ones_like(largest)))

    # 1 / 2**exponent must be a normal number too, so stay two short of the limits.
    limits = jnp.finfo(a.dtype)
    exponent = jnp.clip(exponent, limits.minexp + 2, limits.maxexp - 2)
    return jnp.ldexp(jnp.ones_like(largest), exponent)


def eye_like(a: Float[Array, "*batch k k"]) -> Float[Array, "*batch k k"]:
    """Return identity matrices with the shape and dtype of `a`."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def is_finite(a: Float[Array, "*batch m n"]) -> Bool[Array, "*batch 1 1"]:
    """Return, for each matrix, whether all of its entries are finite."""
    return jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)


def frobenius_norm(a: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    """Return the Frobenius norm of each matrix, without overflow at large scales."""
    scale = power_of_two_scale(a)
    return (jnp.linalg.norm(a / scale, axis=(-2, -1), keepdims=True) * scale)[..., 0, 0]


@jax.custom_jvp
def refuse_derivative(a: Float[Array, ...]) -> Float[Array, ...]:
    """Return `a`; a request for a derivative with respect to it raises a TypeError."""
    return a


@refuse_derivative.defjvp
def _raise_refusal(primals: tuple[Array], tangents: tuple[Array]) -> NoReturn:
    raise TypeError(
        "`a` must not be differentiated by a randomised method, got a derivative "
        "request. Apply jax.lax.stop_gradient to it, or use low_rank_approximation or "
        "truncated_svd."
    )
