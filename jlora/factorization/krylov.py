"""Randomised block Krylov iteration, and the decomposition of what either iteration captured.

Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate
singular value decomposition", 2015; Tropp and Webber, "Randomized algorithms for low-rank matrix
approximation", 2023. Differs: products with the transpose are kept, so that no final pass is
needed, and each block is normalised between its projections.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import matmul
from jlora.factorization.orthonormal import orthonormalize, orthonormalize_against
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import SVD


def krylov_basis(a, omega, num_blocks, *, key):
    """Return (basis [..., m, L], aᵀ basis [..., n, L]) with L = num_blocks * omega's width.

    Two passes a block. The buffers are static and start as zeros; a column that is still zero
    takes no part in a projection, so one loop body serves every block.
    """
    block = omega.shape[-1]
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    keys = jax.random.split(key, num_blocks)
    basis = jnp.zeros((*batch, m, num_blocks * block), a.dtype)
    products = jnp.zeros((*batch, n, num_blocks * block), a.dtype)

    def add_block(i, carry):
        basis, products, direction = carry
        noise = gaussian_sketch(keys[i], m + n, block, a.dtype)
        new = orthonormalize_against(basis, matmul(a, direction), noise[:m])
        product = matmul(a.mT, new)
        start = i * block
        basis = jax.lax.dynamic_update_slice_in_dim(basis, new, start, axis=-1)
        products = jax.lax.dynamic_update_slice_in_dim(products, product, start, axis=-1)
        return basis, products, orthonormalize(product, noise[m:])

    basis, products, _ = jax.lax.fori_loop(0, num_blocks, add_block, (basis, products, omega))
    return basis, products


def decompose_captured(basis, products, rank, noise):
    """Return the SVD of basis @ productsᵀ cut to `rank`, without forming it.

    products = p r with p orthonormal, so basis productsᵀ = basis rᵀ pᵀ and the small matrix r
    has all the singular values.
    """
    p = orthonormalize(products, noise)
    left, s, right = jnp.linalg.svd(matmul(p.mT, products), full_matrices=False)
    u = matmul(basis, right[..., :rank, :].mT)
    return SVD(u, s[..., :rank], matmul(p, left[..., :rank]).mT)
