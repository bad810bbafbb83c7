"""Randomised subspace iteration.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
Differs: the bases are orthonormalised by CholeskyQR rather than Householder QR.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import matmul
from jlora.factorization.krylov import Bidiagonal, draw_noise
from jlora.factorization.operators import multiply, multiply_transposed
from jlora.factorization.orthonormal import orthonormalize


def subspace_factors(a, omega, num_iterations, *, key):
    """Return the `Bidiagonal` after 2 * num_iterations passes, omega [..., b, n] or [b, n]."""
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    noise = draw_noise(key, a, omega, 0)
    noise_m, noise_n = noise[:, :m], noise[:, m : m + n]

    def iterate(right):
        left = orthonormalize(multiply(a, right), noise_m)
        product = multiply_transposed(a, left)
        return left, product, orthonormalize(product, noise_n)

    def step(_, carry):
        return iterate(carry[2])

    start = orthonormalize(omega, noise_n)
    first = iterate(jnp.broadcast_to(start, (*batch, *start.shape[-2:])))
    left, product, right = jax.lax.fori_loop(1, num_iterations, step, first)
    return Bidiagonal(left, matmul(product, right.mT), right)
