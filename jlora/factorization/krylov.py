"""Randomised block Krylov: Golub-Kahan bidiagonalisation in blocks, fully reorthogonalised.

Source: Golub, Luk, Overton, "A block Lanczos method for computing the singular values and
corresponding singular vectors of a matrix", 1981; Musco and Musco, "Randomized block Krylov
methods for stronger and faster approximate singular value decomposition", 2015. Differs: both
bases are projected twice, a block that is exhausted goes on with random directions, and the small
matrix in the middle holds all coefficients rather than the band that exact arithmetic leaves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import matmul
from jlora.factorization.operators import multiply, multiply_transposed
from jlora.factorization.orthonormal import orthonormalize, orthonormalize_against
from jlora.factorization.sketch import gaussian_sketch

# Buffers are static; the loop is cut in two, so that its first half projects on half of them.
# Each part more costs a compilation of the loop's body.
_NUM_SEGMENTS = 2


class Bidiagonal(NamedTuple):
    """a ≈ leftᵀ core right; what is not filled yet is zero."""

    left: jax.Array  # [..., L, m], orthonormal rows
    core: jax.Array  # [..., L, L + b]
    right: jax.Array  # [..., L + b, n], orthonormal rows


def krylov_factors(a, omega, num_blocks, *, key):
    """Return the `Bidiagonal` after 2 * num_blocks passes, from omega [..., b, n] or [b, n]."""
    block = omega.shape[-2]
    noise = draw_noise(key, a, omega, num_blocks)
    factors = start_bidiagonal(a, omega, num_blocks, noise)

    done = 0
    for segment in range(1, _NUM_SEGMENTS + 1):
        until = num_blocks * segment // _NUM_SEGMENTS

        def step(i, factors, width=until * block):
            return add_block(a, factors, i, block, noise, width)

        factors = jax.lax.fori_loop(done, until, step, factors)
        done = until
    return factors


def draw_noise(key, a, omega, num_blocks):
    """Return the noise of all blocks, [b, m + n + num_blocks]; block i starts at column i.

    Shifted by one column, it is as good as drawn anew, and costs nothing.
    """
    block = omega.shape[-2]
    length = a.shape[-2] + a.shape[-1] + num_blocks
    return gaussian_sketch(key, block, length, omega.dtype)


def start_bidiagonal(a, omega, num_blocks, noise):
    """Return the `Bidiagonal` with only its first right block."""
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    block = omega.shape[-2]
    width = num_blocks * block
    first = orthonormalize(
        omega, noise[:, m : m + n]
    )  # one for the whole batch, if it can be
    right = jnp.zeros((*batch, width + block, n), omega.dtype)
    right = _put_rows(right, jnp.broadcast_to(first, (*batch, block, n)), 0)
    left = jnp.zeros((*batch, width, m), omega.dtype)
    return Bidiagonal(
        left, jnp.zeros((*batch, width, width + block), omega.dtype), right
    )


def add_block(a, factors, i, block, noise, width):
    """Return the `Bidiagonal` with block i added: two passes. Blocks lie within `width` rows."""
    m, n = a.shape[-2:]
    fresh = jax.lax.dynamic_slice_in_dim(noise, i, m + n, axis=-1)
    left, core, right = factors
    start = i * block
    # Of a times a right block the left basis holds what came with the last block, and rounding.
    last = _take_rows(left, jnp.maximum(start - block, 0), block)
    direction = _take_rows(right, start, block)
    new, _, _ = orthonormalize_against(
        left[..., :width, :], last, multiply(a, direction), fresh[:, :m]
    )
    product = multiply_transposed(a, new)
    following, near_part, part = orthonormalize_against(
        right[..., : width + block, :], direction, product, fresh[:, m:]
    )
    padding = [(0, 0)] * (core.ndim - 1) + [(0, core.shape[-1] - width - block)]
    row = jnp.pad(part, padding)
    row = _put_columns(row, _take_columns(row, start, block) + near_part, start)
    row = _put_columns(row, matmul(product, following.mT), start + block)
    return Bidiagonal(
        _put_rows(left, new, start),
        _put_rows(core, row, start),
        _put_rows(right, following, start + block),
    )


def _take_rows(buffer, start, size):
    return jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=-2)


def _put_rows(buffer, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=-2)


def _take_columns(buffer, start, size):
    return jax.lax.dynamic_slice_in_dim(buffer, start, size, axis=-1)


def _put_columns(buffer, columns, start):
    return jax.lax.dynamic_update_slice_in_dim(buffer, columns, start, axis=-1)
