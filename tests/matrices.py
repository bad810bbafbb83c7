"""Test matrices, made in float64 from a seed, and what is checked of a decomposition."""

import numpy as np


def random_orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def matrix_of_spectrum(rng, m, n, spectrum):
    k = min(m, n)
    u, v = random_orthonormal(rng, m, k), random_orthonormal(rng, n, k)
    return (u * spectrum(np.arange(1, k + 1))) @ v.T


def spiked(rng, m, n):
    """A Marchenko-Pastur bulk with twelve directions above it, like a trained weight."""
    bulk = rng.standard_normal((m, n)) / np.sqrt(n)
    k = min(12, m, n)
    u, v = random_orthonormal(rng, m, k), random_orthonormal(rng, n, k)
    return bulk + (u * np.geomspace(8, 2.3, k)) @ v.T


SPECTRA = {
    "spiked": spiked,
    "flat": lambda rng, m, n: matrix_of_spectrum(rng, m, n, lambda i: i**-0.2),
    "exponential": lambda rng, m, n: matrix_of_spectrum(rng, m, n, lambda i: 10 ** (-0.1 * i)),
    "rank 5": lambda rng, m, n: rng.standard_normal((m, 5)) @ rng.standard_normal((5, n)),
    "zero": lambda rng, m, n: np.zeros((m, n)),
    "ones": lambda rng, m, n: np.ones((m, n)),
    "repeated": lambda rng, m, n: np.eye(m, n),
    "tiny": lambda rng, m, n: 1e-15 * spiked(rng, m, n),
    "huge": lambda rng, m, n: 1e15 * spiked(rng, m, n),
}


def optimal_error(a, rank):
    """Return ‖a − a_rank‖_F in float64, the least that rank can reach."""
    s = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    return np.sqrt(np.sum(s[rank:] ** 2))


def residual(a, svd):
    u, s, vt = (np.asarray(part, np.float64) for part in svd)
    return np.linalg.norm(np.asarray(a, np.float64) - (u * s) @ vt)


def orthonormality(u):
    """Return max |uᵀu − I|."""
    u = np.asarray(u, np.float64)
    return np.abs(u.mT @ u - np.eye(u.shape[-1])).max()
