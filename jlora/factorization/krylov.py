"""Randomised block Krylov: block Golub-Kahan, with full reorthogonalisation.

Source: Golub, Luk, Overton, "A block Lanczos method for computing the singular values
and corresponding singular vectors of a matrix", 1981; Musco and Musco, "Randomized
block Krylov methods for stronger and faster approximate singular value decomposition",
2015. Differs: each block is projected against its basis twice, random directions
replace an exhausted block, and the core holds all coefficients. In exact arithmetic
only a band of them, the block bidiagonal, is nonzero.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._sharding import vary_as
from jlora._types import Array, DTypeLike, Float, Int, PRNGKey
from jlora.factorization.operators import Matrix, multiply, multiply_transposed
from jlora.factorization.orthonormal import orthonormalize, orthonormalize_against
from jlora.factorization.projection import Projection
from jlora.factorization.sketch import gaussian_sketch, hash_uniform

# A block is projected against a static number of rows, filled or not. Two loops, the
# first of them on half of the rows, save work. Each further segment costs one more
# compilation of the loop's body.
_NUM_SEGMENTS = 2


def project_onto_krylov(
    a: Matrix, omega: Float[Array, "... b n"], num_blocks: int, *, key: PRNGKey
) -> Projection:
    """Return `a` projected onto its block Krylov spaces, after 2 * num_blocks passes.

    `omega` is the first right block, [..., b, n], or [b, n] if the batch shares it.
    """
    block_size = omega.shape[-2]
    noise = draw_noise(key, a, block_size, omega.dtype)
    projection = make_first_block(a, omega, num_blocks, noise)

    first = 0
    for segment in range(1, _NUM_SEGMENTS + 1):
        end = num_blocks * segment // _NUM_SEGMENTS

        def step(
            i: Int[Array, ""], projection: Projection, width: int = end * block_size
        ) -> Projection:
            return add_block(a, projection, i, noise, width)

        projection = jax.lax.fori_loop(first, end, step, projection)
        first = end
    return projection


class BlockNoise(NamedTuple):
    """Standard normal rows that make dependent rows of a block independent."""

    left: Float[Array, "b m"]
    right: Float[Array, "b n"]


def draw_noise(
    key: PRNGKey, a: Matrix, block_size: int, dtype: DTypeLike
) -> BlockNoise:
    """Return the noise of the first block, see `vary_noise` for the others.

    Each side has an array of its own, which is sharded as the rows that it is added to.
    """
    left_key, right_key = jax.random.split(key)
    return BlockNoise(
        gaussian_sketch(left_key, block_size, a.shape[-2], dtype),
        gaussian_sketch(right_key, block_size, a.shape[-1], dtype),
    )


def vary_noise(noise: BlockNoise, i: Int[Array, ""]) -> BlockNoise:
    """Return the noise of block i: each column times a weight that depends on i.

    This is as good as new noise, costs one product for each entry, and every device
    computes its own columns.
    """
    return BlockNoise(*(rows * _weigh_columns(rows, i) for rows in noise))


def _weigh_columns(rows: Float[Array, "b k"], i: Int[Array, ""]) -> Float[Array, "1 k"]:
    columns = jnp.arange(rows.shape[-1], dtype=jnp.uint32)[None]
    step = jnp.uint32(0x9E3779B9)  # neighbouring blocks get unrelated weights
    return hash_uniform(columns + step * i.astype(jnp.uint32), rows.dtype)


def make_first_block(
    a: Matrix,
    omega: Float[Array, "... b n"],
    num_blocks: int,
    noise: BlockNoise,
) -> Projection:
    """Return a projection for `num_blocks` blocks, with only the first right one."""
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    block_size = omega.shape[-2]
    width = num_blocks * block_size

    # Before the broadcast: a batch that shares omega orthonormalises it once.
    first = orthonormalize(omega, noise.right)
    first = jnp.broadcast_to(first, (*batch, block_size, n))
    right = jnp.zeros((*batch, width + block_size, n), omega.dtype)
    right = _update_rows(right, first, 0)

    left = jnp.zeros((*batch, width, m), omega.dtype)
    core = jnp.zeros((*batch, width, width + block_size), omega.dtype)
    return vary_as(Projection(left, core, right), a)


def add_block(
    a: Matrix,
    projection: Projection,
    i: Int[Array, ""],
    noise: BlockNoise,
    width: int,
) -> Projection:
    """Return the projection with block i added to both bases, in two passes.

    `width` is a static bound on the number of filled left rows, block i included.
    """
    block_size = noise.left.shape[-2]
    left, core, right = projection
    offset = i * block_size
    noise = vary_noise(noise, i)

    # In exact arithmetic, a @ directionᵀ overlaps only the previous left block.
    previous = _slice_rows(left, jnp.maximum(offset - block_size, 0), block_size)
    direction = _slice_rows(right, offset, block_size)
    product = multiply(a, direction)
    new_left = orthonormalize_against(
        left[..., :width, :], previous, product, noise.left
    ).rows

    # Likewise, new_left @ a overlaps only the current right block.
    product = multiply_transposed(a, new_left)
    found = orthonormalize_against(
        right[..., : width + block_size, :], direction, product, noise.right
    )

    # The rows of the core are the coefficients of the product in the right basis.
    num_missing = core.shape[-1] - width - block_size
    row = jnp.pad(found.coefficients, [(0, 0)] * (core.ndim - 1) + [(0, num_missing)])
    near = _slice_columns(row, offset, block_size) + found.near_coefficients
    row = _update_columns(row, near, offset)
    row = _update_columns(row, found.own_coefficients, offset + block_size)
    return Projection(
        _update_rows(left, new_left, offset),
        _update_rows(core, row, offset),
        _update_rows(right, found.rows, offset + block_size),
    )


def _slice_rows(
    array: Float[Array, "*batch p q"], offset: Int[Array, ""], size: int
) -> Float[Array, "*batch size q"]:
    return jax.lax.dynamic_slice_in_dim(array, offset, size, axis=-2)


def _update_rows(
    array: Float[Array, "*batch p q"],
    rows: Float[Array, "*batch k q"],
    offset: int | Int[Array, ""],
) -> Float[Array, "*batch p q"]:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, offset, axis=-2)


def _slice_columns(
    array: Float[Array, "*batch p q"], offset: Int[Array, ""], size: int
) -> Float[Array, "*batch p size"]:
    return jax.lax.dynamic_slice_in_dim(array, offset, size, axis=-1)


def _update_columns(
    array: Float[Array, "*batch p q"],
    columns: Float[Array, "*batch p k"],
    offset: Int[Array, ""],
) -> Float[Array, "*batch p q"]:
    return jax.lax.dynamic_update_slice_in_dim(array, columns, offset, axis=-1)
