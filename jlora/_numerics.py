"""Products at a stated precision, the compute dtype, norms, and safe division."""

from __future__ import annotations

import functools
from typing import NamedTuple, NoReturn, overload

import jax
import jax.numpy as jnp

from jlora._types import Array, Bool, DTypeLike, Float, Int

_EXPONENT_OF_ZERO = -(2**20)


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


def thin_dtype(working: DTypeLike) -> jnp.dtype:
    """Return the dtype of x @ u on its way to v, in a layer that computes in `working`.

    It is `working`, but float32 for float16: x @ u may leave the range of float16 where
    (x @ u) @ v does not.
    """
    return jnp.dtype(jnp.float32 if working == jnp.float16 else working)


def safe_divide(
    numerator: Float[Array, ...], denominator: Float[Array, ...]
) -> Float[Array, ...]:
    """Return numerator / denominator, and 0 where the denominator is 0.

    The inner `where` keeps the derivative finite: 0 * inf would make it NaN.
    """
    is_zero = denominator == 0
    quotient = numerator / jnp.where(is_zero, jnp.ones_like(denominator), denominator)
    return jnp.where(is_zero, jnp.zeros_like(quotient), quotient)


def find_exponent(
    a: Float[Array, ...], axis: int | tuple[int, ...] = (-2, -1)
) -> Int[Array, ...]:
    """Return the smallest e with max|a| < 2**e along the axes, which keep size one.

    It is 0 where an entry is not finite. Where all entries are zero it is far below any
    other exponent, so that a zero term never decides a common scale. It has no
    derivative.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(a)), axis=axis, keepdims=True)
    is_usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(is_usable, largest, jnp.ones_like(largest)))
    of_others = jnp.where(largest == 0, _EXPONENT_OF_ZERO, 0)
    return jnp.where(is_usable, exponent, of_others)


def times_power_of_two(
    a: Float[Array, ...], exponent: Int[Array, ...]
) -> Float[Array, ...]:
    """Return a * 2**exponent, also where 2**exponent leaves the range of the dtype.

    Two factors of half the exponent: both are normal numbers, and so are their
    reciprocals, which XLA flushes to zero otherwise.
    """
    limits = jnp.finfo(a.dtype)
    half = exponent // 2
    for part in (half, exponent - half):
        part = jnp.clip(part, limits.minexp + 2, limits.maxexp - 2)
        a = a * jnp.ldexp(jnp.ones((), a.dtype), part)
    return a


class Scaled(NamedTuple):
    """The array a = unit * 2**exponent, whose `unit` has a largest entry in [½, 1).

    Squares and products of `unit` neither overflow nor underflow. The division is
    exact, so no result depends on the scale of `a`.
    """

    unit: Float[Array, ...]
    exponent: Int[Array, ...]  # with axes of size one where the maximum was taken


def split_scale(a: Float[Array, ...], axis: int | tuple[int, ...] = (-2, -1)) -> Scaled:
    """Return `a` as `Scaled`: one exponent for each matrix, or along other axes."""
    exponent = find_exponent(a, axis)
    return Scaled(times_power_of_two(a, -exponent), exponent)


def power_of_two_scale(a: Float[Array, "*batch m n"]) -> Float[Array, "*batch 1 1"]:
    """Return the smallest power of two above max|a| for each matrix.

    Division by it is exact, and keeps the squares inside a Gram matrix from overflow
    and underflow. For a zero matrix it is tiny, for a nonfinite one it is 1.
    """
    # 1 / 2**exponent must be a normal number too, so stay two short of the limits.
    limits = jnp.finfo(a.dtype)
    exponent = jnp.clip(find_exponent(a), limits.minexp + 2, limits.maxexp - 2)
    return jnp.ldexp(jnp.ones((), a.dtype), exponent)


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


_RANDOMISED = (
    "`a` must not be differentiated by a randomised method, got a derivative request. "
    "Apply jax.lax.stop_gradient to it, or use low_rank_approximation or truncated_svd."
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def refuse_derivative(
    a: Float[Array, ...], message: str = _RANDOMISED
) -> Float[Array, ...]:
    """Return `a`; a request for a derivative with respect to it raises a TypeError."""
    del message
    return a


@refuse_derivative.defjvp
def _raise_refusal(
    message: str, primals: tuple[Array], tangents: tuple[Array]
) -> NoReturn:
    raise TypeError(message)
