"""Test matrices of named spectra, made in float64 from a seed.

The benchmarks and the tests share them.
"""

import functools
import zlib

import numpy as np
import scipy.fft

NUM_SPIKES = 12


def make_spiked(rng, m, n):
    """Return a Marchenko-Pastur bulk with twelve directions above it.

    The spectrum resembles a trained weight.
    """
    bulk = rng.standard_normal((m, n)) / np.sqrt(n)

    k = min(NUM_SPIKES, m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    # The edge of the bulk is higher for a tall matrix: the spikes stay above it.
    edge = (1 + np.sqrt(m / n)) / 2
    return bulk + (u * (edge * np.geomspace(8, 2.3, k))) @ v.T


def make_of_spectrum(rng, m, n, spectrum):
    """Return a matrix with given singular values and incoherent singular vectors.

    Args:
        spectrum: Function from the indices 1, 2, ... to the singular values.
    """
    k = min(m, n)
    a = np.zeros((m, n))
    a[np.arange(k), np.arange(k)] = spectrum(np.arange(1, k + 1))
    return _mix(rng, _mix(rng, a).T).T


def make_low_rank_plus_noise(rng, m, n, rank=32):
    """Return a matrix of rank 32 plus noise.

    The singular values are 10 to 1; the largest one of the noise is about 0.1.
    """
    rank = min(rank, m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (m, n))
    noise = rng.standard_normal((m, n)) / (np.sqrt(m) + np.sqrt(n))
    return (u * np.geomspace(10, 1, rank)) @ v.T + 0.1 * noise


def _make_rank_5(rng, m, n):
    return rng.standard_normal((m, 5)) @ rng.standard_normal((5, n))


# The generators of a matrix [m, n], called with (rng, m, n).
SPECTRA = {
    "spiked": make_spiked,
    "flat": functools.partial(make_of_spectrum, spectrum=lambda i: i**-0.2),
    "exponential": functools.partial(
        make_of_spectrum, spectrum=lambda i: 10 ** (-0.1 * i)
    ),
    "low rank plus noise": make_low_rank_plus_noise,
    "rank 5": _make_rank_5,
    "zero": lambda rng, m, n: np.zeros((m, n)),
    "ones": lambda rng, m, n: np.ones((m, n)),
    "repeated": lambda rng, m, n: np.eye(m, n),
    "tiny": lambda rng, m, n: 1e-15 * make_spiked(rng, m, n),
    "huge": lambda rng, m, n: 1e15 * make_spiked(rng, m, n),
}


def make_matrix(spectrum: str, m: int, n: int, layer: int = 0) -> np.ndarray:
    """Return the float64 matrix [m, n] of a named spectrum.

    Args:
        spectrum: A name of `SPECTRA`.
        layer: Index of a layer; each one gets another matrix.
    """
    seed = zlib.crc32(f"{spectrum} {m} {n} {layer}".encode())
    return SPECTRA[spectrum](np.random.default_rng(seed), m, n)


def _mix(rng, a):
    """Return a random orthogonal matrix times `a`.

    The orthogonal matrix is a product of random signs and cosine transforms, twice. It
    is as incoherent as a Gaussian one and costs a few passes over `a`, not the QR of a
    square matrix.
    """
    for _ in range(2):
        signs = rng.choice([-1.0, 1.0], (len(a), 1))
        a = scipy.fft.dct(a * signs, axis=0, norm="ortho")
    return a
