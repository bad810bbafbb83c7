"""Orthonormal bases by CholeskyQR, and by Householder QR as the reference of the tests.

A basis is stored as rows, [..., l, m], because products of rows with a row-major matrix
are fast on a CPU, and other backends have no preference. CholeskyQR consists of matrix
products and Cholesky factors of l×l matrices, which every backend batches. A tall QR is
a loop over the batch on CUDA. We multiply by the inverse of the small Cholesky factor:
a wide triangular solve is slower, and gathers a sharded basis.

Source: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR", 2020.
Differs: the shift is eps √m / 2 * trace(G), because the published one is too large for
float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import eye_like, matmul, power_of_two_scale, safe_divide
from jlora._sharding import vary_as
from jlora._types import Array, Bool, Float, Int
from jlora.factorization.sketch import fixed_sketch

# A shifted step multiplies singular values at the rounding level by about 60, so four
# steps lift them to one. The projections in between shrink them again, so
# allow a few more.
_MAX_PROJECTIONS = 8


class Extension(NamedTuple):
    """y = near_coefficients @ near + coefficients @ basis + own_coefficients @ rows."""

    rows: Float[Array, "*batch l m"]  # orthonormal, and orthogonal to the basis
    own_coefficients: Float[Array, "*batch l l"]
    near_coefficients: Float[Array, "*batch l l"]
    coefficients: Float[Array, "*batch l L"]


class _ProjectionState(NamedTuple):
    """The loop of `orthonormalize_against`.

    The scaled remainder is transform @ rows + coefficients @ basis.
    """

    step: int | Int[Array, ""]
    rows: Float[Array, "*batch l m"]
    gram: Float[Array, "*batch l l"]  # rows @ rowsᵀ
    coefficients: Float[Array, "*batch l L"]  # of the projected part, in the basis
    transform: Float[Array, "*batch l l"]


def orthonormalize(
    y: Float[Array, "*batch l m"], noise: Float[Array, "l m"]
) -> Float[Array, "*batch l m"]:
    """Return orthonormal rows whose span contains the rows of `y`, for l ≤ m.

    `noise` is standard normal, and the batch shares it. A small multiple of it, about
    4 eps of each row's norm, is added. This makes dependent and zero rows independent,
    so rank-deficient input gets a full basis too.
    """
    y = _normalize_rows(y / power_of_two_scale(y))
    return _run_cholesky_qr(_normalize_rows(_perturb(y, noise)))


def factor_rows(
    rows: Float[Array, "*batch k m"],
) -> tuple[Float[Array, "*batch k m"] | None, Float[Array, "*batch k _"]]:
    """Return (basis, part) with rows = part @ basis, or (None, rows) if k ≥ m.

    The basis has orthonormal rows, so rows @ rowsᵀ = part @ partᵀ.
    """
    num_rows, size = rows.shape[-2:]
    if num_rows >= size:
        return None, rows
    basis = orthonormalize(rows, fixed_sketch(num_rows, size, rows.dtype))
    return basis, matmul(rows, basis.mT)


def orthonormalize_against(
    basis: Float[Array, "*batch L m"],
    near: Float[Array, "*batch l m"],
    y: Float[Array, "*batch l m"],
    noise: Float[Array, "l m"],
) -> Extension:
    """Return orthonormal rows that extend `basis` by y, and the coefficients of y.

    The projection onto `near` is subtracted first, because it holds most of the overlap
    of y with the basis. Rounding leaves small components along the rest of the basis,
    and normalising the remainder magnifies them, so the second projection is onto the
    whole basis. Rows that are dependent or almost inside the basis need more
    projections: repeat until the rows are nearly orthonormal.

    Args:
        basis: orthonormal or zero rows.
        near: the rows of `basis` that y is not orthogonal to in exact arithmetic. In
            block Lanczos this is one block. Zeros: no row is known in advance.
        y: the rows to add.
        noise: standard normal, shared by the batch, see `orthonormalize`.
    """
    # Subtract the projection onto `near`, and scale the remainder.
    near_coefficients = matmul(y, near.mT)
    weight, total = _sum_magnitudes(y)
    size = total / y.shape[-1] ** 0.5
    inside = matmul(near_coefficients * weight, near)
    # Divide last. XLA may round a product and the sum after it only once in some
    # programs, and then the bits would depend on the program.
    remainder = safe_divide(y * weight - inside, size)

    def project(state: _ProjectionState) -> _ProjectionState:
        rows, lower = _take_shifted_step(state.rows, state.gram)
        transform = matmul(state.transform, lower)
        inside = matmul(rows, basis.mT)
        rows = rows - matmul(inside, basis)
        new = _ProjectionState(
            state.step + 1,
            rows,
            matmul(rows, rows.mT),
            state.coefficients + matmul(transform, inside),
            transform,
        )
        return _keep_finished(state, new)

    def is_unfinished(state: _ProjectionState) -> Bool[Array, ""]:
        is_open = state.step < _MAX_PROJECTIONS
        return (state.step == 0) | is_open & jnp.any(_is_far(state.gram))

    # Project onto the whole basis, and once more as long as rows are far from
    # orthonormal.
    rows = _perturb(remainder, noise)
    gram = matmul(rows, rows.mT)
    zeros = jnp.zeros((*y.shape[:-1], basis.shape[-2]), y.dtype)
    # Both without the size of y, so that small ones do not vanish.
    transform = eye_like(gram)
    arrays = vary_as((rows, gram, zeros, transform), (basis, y))
    state = _ProjectionState(0, *arrays)
    state = jax.lax.while_loop(is_unfinished, project, state)

    # Rows that are nearly orthonormal need one plain step.
    lower, inverse = _invert_cholesky(state.gram, shift=0.0)
    return Extension(
        matmul(inverse, state.rows),
        size / weight * matmul(state.transform, lower),
        near_coefficients,
        size / weight * state.coefficients,
    )


def _keep_finished(old: _ProjectionState, new: _ProjectionState) -> _ProjectionState:
    """Return the new state, with the old arrays of the matrices that were finished.

    So a matrix gets the same bits whichever others are in its batch.
    """
    if old.gram.ndim == 2:
        return new
    is_open = (old.step == 0) | _is_far(old.gram)[..., None, None]

    def select(old: Array, new: Array) -> Array:
        return jnp.where(is_open, new, old)

    arrays = jax.tree.map(select, tuple(old[1:]), tuple(new[1:]))
    return _ProjectionState(new.step, *arrays)


def _is_far(gram: Float[Array, "*batch l l"]) -> Bool[Array, "*batch"]:
    """Return whether rows with this Gram matrix are far from orthonormal."""
    return jnp.linalg.norm(gram - eye_like(gram), axis=(-2, -1)) > 0.5


def _sum_magnitudes(
    y: Float[Array, "*batch l m"],
) -> tuple[Float[Array, "*batch l 1"], Float[Array, "*batch l 1"]]:
    """Return (w, t) with t = w * Σ|y| for each row, where w is a power of two.

    The sum neither overflows nor vanishes at any scale of y. It replaces the maximum,
    which a sharded panel would have to reduce before all else. Rows of the norm
    Σ|y| / √m have norms between 1 and √m, and near 1 if no entry stands out.
    """
    enlarged, reduced = 2.0**12, 2.0**-20
    large, small = (
        jnp.sum(jnp.abs(y * weight), axis=-1, keepdims=True)
        for weight in (enlarged, reduced)
    )
    fits = jnp.isfinite(large)
    weight = jnp.where(fits, enlarged, reduced).astype(y.dtype)
    return weight, jnp.where(fits, large, small)


def _take_shifted_step(
    y: Float[Array, "*batch l m"], gram: Float[Array, "*batch l l"]
) -> tuple[Float[Array, "*batch l m"], Float[Array, "*batch l l"]]:
    """Return (x, L) with y = L @ x and x closer to orthonormal; `gram` is y @ yᵀ.

    The Gram matrix is first scaled to unit diagonal. Otherwise the shift would swamp
    rows that the last projection made tiny.
    """
    norms = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))[..., None]
    scaled = safe_divide(gram, norms * norms.mT)
    lower, inverse = _invert_cholesky(scaled, _find_shift(y))
    return matmul(safe_divide(inverse, norms.mT), y), norms * lower


def householder(y: Float[Array, "*batch l m"]) -> Float[Array, "*batch l m"]:
    """Return orthonormal rows by Householder QR: the reference of the tests."""
    return jnp.linalg.qr(y.mT)[0].mT


def _normalize_rows(y: Float[Array, "*batch l m"]) -> Float[Array, "*batch l m"]:
    """Return the rows with norm one; zero rows stay zero."""
    # Rows of very different scales: the squares of tiny entries would underflow.
    y = safe_divide(y, jnp.max(jnp.abs(y), axis=-1, keepdims=True))
    return safe_divide(y, jnp.linalg.norm(y, axis=-1, keepdims=True))


def _perturb(
    y: Float[Array, "*batch l m"], noise: Float[Array, "l m"]
) -> Float[Array, "*batch l m"]:
    """Return y plus noise with rows of norm about 4 eps."""
    perturbation = 4 * jnp.finfo(y.dtype).eps / y.shape[-1] ** 0.5 * noise
    return y + jnp.broadcast_to(perturbation, y.shape)


def _run_cholesky_qr(y: Float[Array, "*batch l m"]) -> Float[Array, "*batch l m"]:
    """Return y orthonormalised by two shifted steps and two plain ones.

    A loop although it is short, because each Cholesky factor in a TPU program adds a
    second of compilation.
    """
    shifts = jnp.asarray([_find_shift(y)] * 2 + [0.0] * 2, y.dtype)
    return jax.lax.fori_loop(0, 4, lambda i, y: _take_cholesky_step(y, shifts[i]), y)


def _find_shift(y: Float[Array, "*batch l m"]) -> float:
    """Return the shift of the Gram matrix of y, relative to its trace."""
    # Rounding in the sums of the Gram matrix is about eps √m of its trace. A smaller
    # shift leaves it indefinite if the rows are almost parallel, as in the matrix of
    # ones.
    return 0.5 * y.shape[-1] ** 0.5 * float(jnp.finfo(y.dtype).eps)


def _take_cholesky_step(
    y: Float[Array, "*batch l m"], shift: Float[Array, ""]
) -> Float[Array, "*batch l m"]:
    """Return L⁻¹ y, where L is the Cholesky factor of the shifted Gram matrix."""
    _, inverse = _invert_cholesky(matmul(y, y.mT), shift)
    return matmul(inverse, y)


def _invert_cholesky(
    gram: Float[Array, "*batch l l"], shift: float | Float[Array, ""]
) -> tuple[Float[Array, "*batch l l"], Float[Array, "*batch l l"]]:
    """Return (L, L⁻¹) with L Lᵀ = gram + shift * trace * I."""
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    eye = eye_like(gram)
    lower = jax.lax.linalg.cholesky(gram + shift * trace * eye, symmetrize_input=False)
    inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return lower, inverse
