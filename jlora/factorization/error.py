"""A-posteriori error estimates."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import compute_dtype, frobenius_norm, matmul, power_of_two_scale
from jlora.factorization.operators import multiply, solve_stored
from jlora.factorization.orthonormal import orthonormalize
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import SVD, check_svd


def estimate_error(a, svd, *, key, num_probes=10):
    """Return an estimate of ‖a − u diag(s) vt‖_F, from a few random directions.

    For a standard normal z, E‖(a − u s vt) z‖² = ‖a − u s vt‖_F²; the estimate is the root of the
    mean over the probes.

    Shapes: m, n rows and columns, r rank, ... batch axes.

    Args:
        a: [..., m, n] real floating.
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        key: one typed PRNG key, consumed; another one than made the SVD.
        num_probes: static, ≥ 1.

    Returns:
        [...] in the compute dtype. NaN where the matrix has NaN or Inf.

    Raises:
        TypeError: arrays or key of the wrong kind.
        ValueError: shapes that do not fit, or num_probes below 1.

    Cost: one pass over a, 2 num_probes m n flops; memory num_probes (m + n).

    Accuracy: its square is unbiased, with a relative standard deviation of at most
        √(2 / num_probes), and of √(2 / (num_probes ρ)) for a residual of stable rank ρ: a
        few per cent on the residuals of weights. Differences below 10 eps ‖a‖_F are rounding.

    Gradients: exact, of the estimate as a function of `a` and `svd`.

    Source: Hutchinson 1990; Martinsson and Tropp, "Randomized numerical linear algebra", 2020,
        section 4.8.

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
    _checks.check_shape(
        (*u.shape[:-1], vt.shape[-1]), a.shape, "svd", "that of u @ vt: the a's"
    )
    _checks.check_key(key)
    num_probes = _checks.check_integer(num_probes, "num_probes")
    return _estimate_error(a, SVD(u, s, vt), key, num_probes)


def estimate_sketch_error(sketch, *, key):
    """Return an estimate of ‖a − q qᵀ a‖_F from a sketch a @ omega alone, q its orthonormal basis.

    Leave one out: column j of the sketch is a probe of the basis that the others span, and its
    distance from their span is 1 / ‖row j of R⁻¹‖ for the sketch = q R. No further pass.

    Shapes: m rows of a, l columns of the sketch, ... batch axes.

    Args:
        sketch: [..., m, l] real floating, a @ omega for a standard normal omega [n, l], l ≤ m.
        key: one typed PRNG key, consumed; for the trace of noise that keeps a rank-deficient
            sketch invertible.

    Returns:
        [...] in the compute dtype.

    Raises:
        TypeError: arrays or key of the wrong kind.
        ValueError: more columns than rows.

    Cost: O(m l²) flops.

    Accuracy: within a few per cent where the spectrum decays slowly; for a fast decay it is the
        error with one column less, that is up to a factor of one step of the decay too large.
        Below 1e-6 ‖sketch‖_F in float32 it is rounding.

    Source: Epperly and Tropp, "Efficient error and variance estimation for randomized matrix
        computations", 2022, section 2.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (300, 200))
        >>> sketch = a @ jax.random.normal(jax.random.key(1), (200, 20))
        >>> round(float(jlora.factorization.estimate_sketch_error(sketch, key=jax.random.key(2))), -1)
        230.0
    """
    sketch = _checks.check_matrix(sketch, "sketch")
    _checks.check_key(key)
    if sketch.shape[-1] > sketch.shape[-2]:
        raise ValueError(
            f"`sketch` must have at most as many columns as rows, got shape {sketch.shape}. "
            "Use fewer probes."
        )
    return _estimate_sketch_error(sketch, key)


@functools.partial(jax.jit, static_argnames="num_probes")
def _estimate_error(a, svd, key, num_probes):
    dtype = compute_dtype(a.dtype, svd.s.dtype)
    probes = gaussian_sketch(key, num_probes, a.shape[-1], dtype)
    probes = jnp.broadcast_to(probes, (*a.shape[:-2], *probes.shape))
    u, s, vt = (part.astype(dtype) for part in svd)
    coordinates = matmul(probes, vt.mT) * s[..., None, :]
    left = _multiply(a, probes) - matmul(coordinates, u.mT)
    return frobenius_norm(left) / num_probes**0.5


def _multiply(a, rows):
    # An SVD in float64 of a matrix in float32 is judged in float64.
    is_wide = a.dtype == compute_dtype(a.dtype)
    return (
        multiply(a.astype(rows.dtype), rows)
        if is_wide
        else solve_stored(multiply, a, rows)
    )


@jax.jit
def _estimate_sketch_error(sketch, key):
    rows = sketch.astype(compute_dtype(sketch.dtype)).mT
    scale = power_of_two_scale(rows)
    rows = rows / scale
    noise = gaussian_sketch(key, *rows.shape[-2:], rows.dtype)
    basis = orthonormalize(rows, noise)
    factor = matmul(rows, basis.mT)  # sketchᵀ = factor basis
    size = jnp.linalg.norm(factor, axis=(-2, -1), keepdims=True)
    # A rank-deficient sketch has a singular factor: an inverse at the rounding level instead.
    left, s, right = jnp.linalg.svd(factor, full_matrices=False)
    s = jnp.maximum(s[..., None, :], jnp.finfo(s.dtype).eps * size)
    inverse = matmul(right.mT / s, left.mT)
    distances = 1 / jnp.sum(inverse**2, axis=-2)
    return jnp.sqrt(jnp.mean(distances, axis=-1)) * scale[..., 0, 0]
