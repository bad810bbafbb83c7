"""Test matrices by name, made in float64 from a seed; shared by the benchmarks and the tests."""

import functools
import zlib

import numpy as np
import scipy.fft

NUM_SPIKES = 12


def make_spiked(rng, m, n):
    """A Marchenko-Pastur bulk with twelve directions above it, like a trained weight."""
    bulk = rng.standard_normal((m, n)) / np.sqrt(n)
    k = min(NUM_SPIKES, m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    # The edge of the bulk of a tall matrix lies higher: the spikes stay above it.
    edge = (1 + np.sqrt(m / n)) / 2
    return bulk + (u * (edge * np.geomspace(8, 2.3, k))) @ v.T


def make_of_spectrum(rng, m, n, spectrum):
    """A matrix of the singular values spectrum(1, 2, ...), with incoherent singular vectors."""
    k = min(m, n)
    a = np.zeros((m, n))
    a[np.arange(k), np.arange(k)] = spectrum(np.arange(1, k + 1))
    return _mix(rng, _mix(rng, a).T).T


def make_low_rank_plus_noise(rng, m, n, rank=32):
    """Rank 32 with singular values of 10 to 1 above noise whose largest is about 0.1."""
    rank = min(rank, m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (m, n))
    noise = rng.standard_normal((m, n)) / (np.sqrt(m) + np.sqrt(n))
    return (u * np.geomspace(10, 1, rank)) @ v.T + 0.1 * noise


SPECTRA = {
    "spiked": make_spiked,
    "flat": functools.partial(make_of_spectrum, spectrum=lambda i: i**-0.2),
    "exponential": functools.partial(
        make_of_spectrum, spectrum=lambda i: 10 ** (-0.1 * i)
    ),
    "low rank plus noise": make_low_rank_plus_noise,
    "rank 5": lambda rng, m, n: (
        rng.standard_normal((m, 5)) @ rng.standard_normal((5, n))
    ),
    "zero": lambda rng, m, n: np.zeros((m, n)),
    "ones": lambda rng, m, n: np.ones((m, n)),
    "repeated": lambda rng, m, n: np.eye(m, n),
    "tiny": lambda rng, m, n: 1e-15 * make_spiked(rng, m, n),
    "huge": lambda rng, m, n: 1e15 * make_spiked(rng, m, n),
}


def make_matrix(spectrum, m, n, layer=0):
    """Return the float64 matrix [m, n] of a spectrum; another one for each layer."""
    seed = zlib.crc32(f"{spectrum} {m} {n} {layer}".encode())
    return SPECTRA[spectrum](np.random.default_rng(seed), m, n)


def _mix(rng, a):
    """Multiply from the left by a random orthogonal matrix: signs and cosine transforms, twice.

    As incoherent as a Gaussian one, at the cost of a few passes instead of a QR of a square.
    """
    for _ in range(2):
        a = scipy.fft.dct(
            a * rng.choice([-1.0, 1.0], (len(a), 1)), axis=0, norm="ortho"
        )
    return a
