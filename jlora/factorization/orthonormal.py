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

from jlora._numerics import eye_like, matmul, power_of_two_scale, safe_divide

# Singular values at the rounding level grow about 60 times a shifted step: four reach one, and
# what the projections between them take away needs a few more.
_MOST_PROJECTIONS = 8


def orthonormalize(y, noise):
    """Return orthonormal rows whose span holds that of y, [..., l, m] with l ≤ m.

    `noise` [l, m] is standard normal, the same for all of a batch. A trace of it (4 eps of each
    row) makes dependent and zero rows independent, so that rank-deficient input gets a full basis
    too.
    """
    y = _normalize_rows(y / power_of_two_scale(y))
    return _robust_cholesky_qr(_normalize_rows(_perturb(y, noise)))


def orthonormalize_against(basis, near, y, noise):
    """Return (rows, near_part, part): `rows` extend `basis` by the span of y [..., l, m].

    Rows of `basis` [..., L, m] are orthonormal or zero. `near` [..., l, m] are those among them
    that hold all of y that the basis holds, but for rounding: of a block Lanczos process the last
    block. Then y ≈ near_part @ near + part @ basis plus something in the span of `rows`.

    The large part is taken out by the short product with `near`. What rounding left of the others
    grows when the rest is scaled up to norm one, so that is projected on the whole basis: once,
    or until what the projection leaves is nearly orthonormal, for rows that are dependent or all
    but inside the basis.
    """
    scale = power_of_two_scale(y)
    scaled = y / scale
    size = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    near_part = matmul(y, near.mT)
    rest = safe_divide(scaled - matmul(near_part / scale, near), size)

    def project(state):
        i, rows, gram, part, transform = state
        rows, lower = _scale_up(rows, gram)
        transform = matmul(transform, lower)
        inside = matmul(rows, basis.mT)
        rows = rows - matmul(inside, basis)
        return (
            i + 1,
            rows,
            matmul(rows, rows.mT),
            part + matmul(transform, inside),
            transform,
        )

    def is_far(state):
        i, _, gram, *_ = state
        distance = jnp.linalg.norm(gram - eye_like(gram), axis=(-2, -1))
        return (i == 0) | (i < _MOST_PROJECTIONS) & jnp.any(distance > 0.5)

    rest = _perturb(rest, noise)
    gram = matmul(rest, rest.mT)
    nothing = jnp.zeros((*y.shape[:-1], basis.shape[-2]), y.dtype)
    start = 0, rest, gram, nothing, scale * size * eye_like(gram)
    _, rest, gram, part, _ = jax.lax.while_loop(is_far, project, start)
    _, inverse = _factor(gram, shift=0.0)
    return matmul(inverse, rest), near_part, part


def _scale_up(y, gram):
    """Return (x, L) with L @ x = y, x nearer to orthonormal rows; `gram` is that of y.

    The Gram matrix gets ones on its diagonal first: rows of which the last projection left little
    would vanish in the shift.
    """
    length = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    lower, inverse = _factor(safe_divide(gram, length * length.mT), _find_shift(y))
    return matmul(safe_divide(inverse, length.mT), y), length * lower


def householder(y):
    """Return orthonormal rows by Householder QR: the oracle of the tests."""
    return jnp.linalg.qr(y.mT)[0].mT


def _normalize_rows(y):
    # Rows of very different sizes: squares of the smallest vanish beside the largest.
    y = safe_divide(y, jnp.max(jnp.abs(y), axis=-1, keepdims=True))
    return safe_divide(y, jnp.linalg.norm(y, axis=-1, keepdims=True))


def _perturb(y, noise):
    trace = 4 * jnp.finfo(y.dtype).eps / y.shape[-1] ** 0.5 * noise
    return y + jnp.broadcast_to(trace, y.shape)


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
    _, inverse = _factor(matmul(y, y.mT), shift)
    return matmul(inverse, y)


def _factor(gram, shift):
    """Return (L, inverse of L) of gram + shift * trace * I = L Lᵀ."""
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    eye = eye_like(gram)
    lower = jax.lax.linalg.cholesky(gram + shift * trace * eye, symmetrize_input=False)
    return lower, jax.lax.linalg.triangular_solve(
        lower, eye, left_side=True, lower=True
    )
