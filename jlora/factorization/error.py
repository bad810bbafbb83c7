"""Estimates of the error of a decomposition, from a few random directions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import compute_dtype, frobenius_norm, matmul, power_of_two_scale
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, PRNGKey
from jlora.factorization.operators import multiply, solve_stored
from jlora.factorization.orthonormal import orthonormalize
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import SVD, SVD_AXES, check_svd


def estimate_error(
    a: Float[AnyArray, "*batch m n"], svd: SVD, *, key: PRNGKey, num_probes: int = 10
) -> Float[Array, "*batch"]:
    """Return an estimate of ‖a − u diag(s) vt‖_F, from a few random directions.

    E‖(a − u diag(s) vt) z‖² = ‖a − u diag(s) vt‖_F² for a standard normal z. The
    estimate is the root of the mean over the probes z.

    Args:
        a: real floating.
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        key: one typed PRNG key, consumed. Not the key that made the SVD.
        num_probes: static, at least 1.

    Returns:
        [...] in the compute dtype. NaN where the matrix has NaN or Inf.

    Raises:
        TypeError: an array or the key has the wrong kind.
        ValueError: the shapes do not fit, or num_probes is below 1.

    Cost: one pass over a, 2 num_probes m n flops. Memory for num_probes (m + n)
        elements.

    Accuracy: the square of the estimate is unbiased. Its relative standard deviation is
        at most √(2 / num_probes), and √(2 / (num_probes ρ)) for a residual of stable
        rank ρ: a few per cent on the residuals of weights. Differences below 10 eps
        ‖a‖_F are rounding.

    Gradients: exact, of the estimate as a function of `a` and `svd`.

    Source: Hutchinson 1990; Martinsson and Tropp, "Randomized numerical linear
        algebra", 2020, section 4.8.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> a = jax.random.normal(jax.random.key(0), (300, 200))
        >>> svd = jlora.truncated_svd(a, 20)
        >>> error = jlora.estimate_error(a, svd, key=jax.random.key(1))
        >>> true = jnp.linalg.norm(a - jlora.reconstruct(jlora.split_svd(svd)))
        >>> bool(abs(error - true) < 0.1 * true)
        True
    """
    a = _checks.check_matrix(a)
    u, s, vt = check_svd(svd)
    shape = (*u.shape[:-1], vt.shape[-1])
    _checks.check_shape(shape, a.shape, "svd", "for u @ vt, the shape of a")
    _checks.check_key(key)
    num_probes = _checks.check_integer(num_probes, "num_probes")
    return _estimate_error(a, SVD(u, s, vt), key, num_probes)


def estimate_sketch_error(
    sketch: Float[AnyArray, "*batch m l"], *, key: PRNGKey
) -> Float[Array, "*batch"]:
    """Return an estimate of ‖a − q qᵀ a‖_F from a sketch a @ omega, without reading a.

    The columns of q are an orthonormal basis of the sketch. Leave one out: column j of
    the sketch is a probe of the basis that the other columns span, and its distance
    from their span is 1 / ‖row j of R⁻¹‖, where sketch = q R.

    Args:
        sketch: a @ omega, real floating, for a standard normal omega [n, l], l ≤ m.
        key: one typed PRNG key, consumed. It draws the small noise that keeps a
            rank-deficient sketch invertible.

    Returns:
        [...] in the compute dtype.

    Raises:
        TypeError: the array or the key has the wrong kind.
        ValueError: the sketch has more columns than rows.

    Cost: O(m l²) flops.

    Accuracy: within a few per cent if the spectrum decays slowly. If it decays fast,
        the estimate is the error of a basis with one column less, so it is too large by
        up to one step of the decay. Below 1e-6 ‖sketch‖_F in float32 it is rounding.

    Source: Epperly and Tropp, "Efficient error and variance estimation for randomized
        matrix computations", 2022, section 2.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (300, 200))
        >>> sketch = a @ jax.random.normal(jax.random.key(1), (200, 20))
        >>> key = jax.random.key(2)
        >>> round(float(jlora.factorization.estimate_sketch_error(sketch, key=key)), -1)
        230.0
    """
    sketch = _checks.check_matrix(sketch, "sketch")
    _checks.check_key(key)
    if sketch.shape[-1] > sketch.shape[-2]:
        raise ValueError(
            f"`sketch` must have at most as many columns as rows, got shape "
            f"{sketch.shape}. Use fewer probes."
        )
    return _estimate_sketch_error(sketch, key)


@functools.partial(jax.jit, static_argnames="num_probes")
@follow_axes("*b m n", SVD_AXES, None, result="*b")
def _estimate_error(
    a: Float[Array, "*batch m n"], svd: SVD, key: PRNGKey, num_probes: int
) -> Float[Array, "*batch"]:
    dtype = compute_dtype(a.dtype, svd.s.dtype)
    probes = gaussian_sketch(key, num_probes, a.shape[-1], dtype)
    probes = jnp.broadcast_to(probes, (*a.shape[:-2], *probes.shape))

    u, s, vt = (array.astype(dtype) for array in svd)
    coordinates = matmul(probes, vt.mT) * s[..., None, :]
    residual = _multiply_probes(a, probes) - matmul(coordinates, u.mT)
    return frobenius_norm(residual) / num_probes**0.5


def _multiply_probes(
    a: Float[Array, "*batch m n"], probes: Float[Array, "*batch p n"]
) -> Float[Array, "*batch p m"]:
    """Return (a @ probesᵀ)ᵀ in the dtype of `probes`."""
    # A float64 SVD of a float32 matrix is judged in float64, so cast the matrix too.
    if a.dtype == compute_dtype(a.dtype):
        return multiply(a.astype(probes.dtype), probes)
    return solve_stored(multiply, a, probes)


@jax.jit
@follow_axes("*b m l", None, result="*b")
def _estimate_sketch_error(
    sketch: Float[Array, "*batch m l"], key: PRNGKey
) -> Float[Array, "*batch"]:
    rows = sketch.astype(compute_dtype(sketch.dtype)).mT
    scale = power_of_two_scale(rows)
    rows = rows / scale

    # sketchᵀ = factor @ basis, so the factor is Rᵀ.
    noise = gaussian_sketch(key, rows.shape[-2], rows.shape[-1], rows.dtype)
    basis = orthonormalize(rows, noise)
    factor = matmul(rows, basis.mT)

    # A rank-deficient sketch has a singular factor: limit its inverse to 1 / rounding.
    size = jnp.linalg.norm(factor, axis=(-2, -1), keepdims=True)
    u, s, vt = jnp.linalg.svd(factor, full_matrices=False)
    s = jnp.maximum(s[..., None, :], jnp.finfo(s.dtype).eps * size)
    is_zero = size == 0
    s = jnp.where(is_zero, 1, s)
    inverse = matmul(vt.mT / s, u.mT)

    squares = 1 / jnp.sum(inverse**2, axis=-2)  # squared distances of the columns
    error = jnp.sqrt(jnp.mean(squares, axis=-1)) * scale[..., 0, 0]
    return jnp.where(is_zero[..., 0, 0], 0, error)
