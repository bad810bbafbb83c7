"""Randomised subspace iteration.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, algorithm
4.4. Differs: CholeskyQR orthonormalises the bases instead of Householder QR.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import matmul
from jlora._types import Array, Float, Int, PRNGKey
from jlora.factorization.krylov import draw_noise
from jlora.factorization.operators import Matrix, multiply, multiply_transposed
from jlora.factorization.orthonormal import orthonormalize
from jlora.factorization.projection import Projection


class _State(NamedTuple):
    """The bases after some iterations."""

    left: Float[Array, "*batch b m"]  # orthonormal rows
    product: Float[Array, "*batch b n"]  # left @ a
    right: Float[Array, "*batch b n"]  # orthonormal rows with the span of `product`


def project_onto_subspace(
    a: Matrix, omega: Float[Array, "... b n"], num_iterations: int, *, key: PRNGKey
) -> Projection:
    """Return `a` projected onto the leading subspaces, after 2 * num_iterations passes.

    `omega` is the first right block, [..., b, n], or [b, n] if the batch shares it.
    """
    noise = draw_noise(key, a, omega.shape[-2], omega.dtype)

    def iterate(right: Float[Array, "*batch b n"]) -> _State:
        left = orthonormalize(multiply(a, right), noise.left)
        product = multiply_transposed(a, left)
        return _State(left, product, orthonormalize(product, noise.right))

    def step(_: Int[Array, ""], state: _State) -> _State:
        return iterate(state.right)

    right = orthonormalize(omega, noise.right)
    state = iterate(jnp.broadcast_to(right, (*a.shape[:-2], *right.shape[-2:])))
    left, product, right = jax.lax.fori_loop(1, num_iterations, step, state)
    return Projection(left, matmul(product, right.mT), right)
