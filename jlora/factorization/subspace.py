"""Randomised subspace iteration.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, algorithm 4.4.
Differs: the basis is orthonormalised by CholeskyQR rather than Householder QR.
"""

import jax

from jlora._numerics import matmul
from jlora.factorization.orthonormal import orthonormalize
from jlora.factorization.sketch import gaussian_sketch


def subspace_basis(a, omega, num_iterations, *, key):
    """Return (basis [..., m, l], aᵀ basis [..., n, l]) after 2 * num_iterations passes."""
    m, n = a.shape[-2:]
    noise = gaussian_sketch(key, m + n, omega.shape[-1], a.dtype)

    def half_steps(direction):
        basis = orthonormalize(matmul(a, direction), noise[:m])
        return basis, matmul(a.mT, basis)

    def step(_, carry):
        return half_steps(orthonormalize(carry[1], noise[m:]))

    return jax.lax.fori_loop(1, num_iterations, step, half_steps(omega))
