"""Orthonormal bases: the CholeskyQR family, and Householder as the oracle.

A basis is stored as rows, [..., l, m]: that is the layout in which products with a row-major
matrix are fast on a CPU, and no other backend minds. CholeskyQR is made of matrix products and
l×l Cholesky factors, which every backend batches; a tall QR is a loop over the batch on CUDA.
The inverse of the small factor is formed and multiplied in, because a wide triangular solve is
slower and gathers a sharded basis.

Source: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR", 2020.
Differs: the shift is eps √m / 2 * trace(G); the published one is too large to be of use in float32.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import matmul, power_of_two_scale, safe_divide


def orthonormalize(y, noise):
    """Return orthonormal rows whose span holds that of y, [..., l, m] with l ≤ m.

    `noise` [..., l, m] is standard normal. A trace of it (4 eps of each row) makes dependent and
    zero rows independent, so that rank-deficient input gets a full basis too.
    """
    y = _normalize_rows(y / power_of_two_scale(y))
    return _robust_cholesky_qr(_normalize_rows(_perturb(y, noise)))


def orthonormalize_against(basis, y, noise):
    """Return (rows, coefficients): `rows` extend `basis` by the span of y [..., l, m].

    Rows of `basis` [..., L, m] are orthonormal or zero; y ≈ coefficients @ basis plus something
    in the span of `rows`. Two projections: what the first leaves can be rounding error, and
    only once that is scaled up to norm one does the second make it orthogonal.
    """
    scale = power_of_two_scale(y)
    y = y / scale
    coefficients = matmul(y, basis.mT)
    size = jnp.linalg.norm(y, axis=-1, keepdims=True)
    left = safe_divide(y - matmul(coefficients, basis), size)
    y = _normalize_rows(_perturb(left, noise))
    y = _cholesky_qr(y, _find_shift(y))
    y = _project_out(basis, y)
    gram = matmul(y, y.mT)
    distance = jnp.linalg.norm(gram - _eye_like(gram), axis=(-2, -1))
    rows = jax.lax.cond(
        jnp.any(distance > 0.5), _orthonormalize_again, _finish_healthy, basis, y, gram
    )
    return rows, coefficients * scale


def householder(y):
    """Return orthonormal rows by Householder QR: the oracle of the tests."""
    return jnp.linalg.qr(y.mT)[0].mT


def _finish_healthy(basis, y, gram):
    """Finish a block that is nearly orthonormal already: two plain steps do."""
    return _cholesky_qr(_multiply_inverse(gram, y), shift=0.0)


def _orthonormalize_again(basis, y, gram):
    """Finish a block that is ill-conditioned or that the projection left little of.

    In a block of an exhausted matrix, the first projection leaves parallel rows, and the second
    takes away most of what told them apart: hence the shifts, and two more projections.
    """

    def project(_, y):
        return _project_out(basis, _robust_cholesky_qr(y))

    y = jax.lax.fori_loop(0, 2, project, _normalize_rows(y))
    return _robust_cholesky_qr(y)


def _project_out(basis, y):
    return y - matmul(matmul(y, basis.mT), basis)


def _normalize_rows(y):
    # Rows of very different sizes: squares of the smallest vanish beside the largest.
    y = safe_divide(y, jnp.max(jnp.abs(y), axis=-1, keepdims=True))
    return safe_divide(y, jnp.linalg.norm(y, axis=-1, keepdims=True))


def _perturb(y, noise):
    return y + 4 * jnp.finfo(y.dtype).eps / y.shape[-1] ** 0.5 * noise


def _robust_cholesky_qr(y):
    """Return y orthonormalised by two shifted and two plain steps.

    A loop, although it is short: every Cholesky factor that a TPU program holds costs it a
    second of compilation.
    """
    shifts = jnp.asarray([_find_shift(y)] * 2 + [0.0] * 2, y.dtype)
    return jax.lax.fori_loop(0, 4, lambda i, y: _cholesky_qr(y, shifts[i]), y)


def _find_shift(y):
    # The sums behind the Gram matrix err by about eps √m of its trace: less shift than that
    # leaves it indefinite for rows that are all but parallel (the matrix of ones).
    return 0.5 * y.shape[-1] ** 0.5 * float(jnp.finfo(y.dtype).eps)


def _cholesky_qr(y, shift):
    gram = matmul(y, y.mT)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    return _multiply_inverse(gram + shift * trace * _eye_like(gram), y)


def _multiply_inverse(gram, y):
    """Return inverse(L) @ y for gram = L Lᵀ."""
    lower = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, _eye_like(gram), left_side=True, lower=True)
    return matmul(inverse, y)


def _eye_like(gram):
    return jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
