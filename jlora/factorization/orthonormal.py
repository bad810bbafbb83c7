"""Orthonormal bases: the CholeskyQR family, and Householder as the oracle.

CholeskyQR is made of products and l×l Cholesky factors, which every backend batches; a tall
QR is a loop over the batch on CUDA. The inverse of the small factor is formed and multiplied
in, because an m×l triangular solve is slower and gathers a sharded basis.

Source: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR", 2020.
Differs: the shift is eps √m / 2 * trace(G); the published one is too large to be of use in float32.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import matmul, power_of_two_scale, safe_divide


def orthonormalize(y, noise):
    """Return orthonormal columns whose span holds that of y, [..., m, l] with l ≤ m.

    `noise` [m, l] is standard normal. A trace of it (4 eps of each column) makes dependent and
    zero columns independent, so that rank-deficient input gets a full basis too.
    """
    return _cholesky_qr2(_shifted_cholesky_qr2(_perturb(_normalize_columns(y), noise)))


def orthonormalize_against(basis, y, noise):
    """Return orthonormal columns that extend `basis` [..., m, L] by the span of y [..., m, l].

    Columns of `basis` are orthonormal or zero. Projection and normalisation alternate: what is
    left of y after one projection can be rounding error, and only once that is scaled up to
    norm one does the next projection make it orthogonal.
    """
    y = _perturb(_normalize_columns(y), noise)
    y = _shifted_cholesky_qr2(_normalize_columns(_project_out(basis, y)))
    # Shifted here too: with one new direction among exhausted ones, what the first projection
    # leaves is parallel columns, and the second can take away most of what told them apart.
    y = _normalize_columns(_project_out(basis, y))
    y = _cholesky_qr2(_shifted_cholesky_qr2(y))
    return _cholesky_qr2(_project_out(basis, y))


def householder(y):
    """Return orthonormal columns by Householder QR: the oracle of the tests."""
    return jnp.linalg.qr(y)[0]


def _project_out(basis, y):
    return y - matmul(basis, matmul(basis.mT, y))


def _normalize_columns(y):
    y = y / power_of_two_scale(y)
    # Columns of very different sizes: squares of the smallest vanish beside the largest.
    y = safe_divide(y, jnp.max(jnp.abs(y), axis=-2, keepdims=True))
    return safe_divide(y, jnp.linalg.norm(y, axis=-2, keepdims=True))


def _perturb(y, noise):
    size = 4 * jnp.finfo(y.dtype).eps / y.shape[-2] ** 0.5
    return y + size * jnp.broadcast_to(noise, y.shape)


def _shifted_cholesky_qr2(y):
    return _cholesky_qr(_cholesky_qr(y, shift=1.0), shift=1.0)


def _cholesky_qr2(y):
    return _cholesky_qr(_cholesky_qr(y, shift=0.0), shift=0.0)


def _cholesky_qr(y, shift):
    gram = matmul(y.mT, y)
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=y.dtype), gram.shape)
    if shift:
        trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
        # The sums behind the Gram matrix err by about eps √m of its trace: less shift than that
        # leaves it indefinite for columns that are all but parallel (the matrix of ones).
        size = shift * 0.5 * y.shape[-2] ** 0.5 * jnp.finfo(y.dtype).eps
        gram = gram + size * trace * eye
    lower = jax.lax.linalg.cholesky(gram)
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return matmul(y, inverse.mT)
