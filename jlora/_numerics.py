"""Matrix products at a stated precision, the compute dtype, safe division."""

import jax
import jax.numpy as jnp


def common_dtype(*dtypes):
    """Return the dtype that holds all the given ones, also under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        # Canonical first: without x64 a float64 array of NumPy would bring a warning.
        return jnp.result_type(*map(jax.dtypes.canonicalize_dtype, dtypes))


def compute_dtype(*dtypes):
    """Return the dtype to compute in: the widest given, and at least float32."""
    return common_dtype(jnp.float32, *dtypes)


def to_compute(*arrays):
    """Return `arrays` in their common compute dtype."""
    dtype = compute_dtype(*(array.dtype for array in arrays))
    cast = tuple(array.astype(dtype) for array in arrays)
    return cast[0] if len(cast) == 1 else cast


def matmul(a, b):
    """Return a @ b in full precision: never TF32 on a GPU, never bfloat16 on a TPU."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def matmul_activations(x, w):
    """Return x @ w for model activations, accumulated in at least float32.

    The precision of float32 operands is left to `jax.default_matmul_precision`, so that an
    adapted layer computes like the plain layer beside it.
    """
    accumulator = compute_dtype(x.dtype, w.dtype)
    return jnp.matmul(x, w, precision=None, preferred_element_type=accumulator)


def safe_divide(numerator, denominator):
    """Return numerator / denominator, and 0 where the denominator is 0.

    The inner `where` keeps the derivative finite: 0 * inf would make it NaN.
    """
    zero = denominator == 0
    quotient = numerator / jnp.where(zero, jnp.ones_like(denominator), denominator)
    return jnp.where(zero, jnp.zeros_like(quotient), quotient)


def power_of_two_scale(a):
    """Return the power of two nearest below max|a| of each matrix, [..., 1, 1]; 1 for zero.

    Dividing by it is exact, and keeps the squares inside a Gram matrix from overflowing
    or vanishing at scales like 1e±15.
    """
    largest = jnp.max(jnp.abs(a), axis=(-2, -1), keepdims=True)
    usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, jnp.ones_like(largest)))
    limits = jnp.finfo(a.dtype)
    # 1 / 2**exponent has to be a normal number too, hence the clip two short of the limits.
    exponent = jnp.clip(exponent, limits.minexp + 2, limits.maxexp - 2)
    return jnp.ldexp(jnp.ones_like(largest), exponent)


def eye_like(a):
    """Return the identity of the size and batch axes of square matrices."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def is_finite(a):
    """Return whether all of each matrix is finite, [..., 1, 1]."""
    return jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)


def frobenius_norm(a):
    """Return the Frobenius norm of each matrix, without overflow at large scales."""
    scale = power_of_two_scale(a)
    return (jnp.linalg.norm(a / scale, axis=(-2, -1), keepdims=True) * scale)[..., 0, 0]


@jax.custom_jvp
def refuse_derivative(a):
    """Return `a`; a derivative with respect to it is refused when it is asked for."""
    return a


@refuse_derivative.defjvp
def _raise_refusal(primals, tangents):
    raise TypeError(
        "`a` must not be differentiated by a randomised method, got a derivative request. "
        "Apply jax.lax.stop_gradient to it, or use low_rank_approximation or truncated_svd."
    )
