"""Matrices on which decompositions fail: name → function of (rng, m, n), float64.

After the test sets of Tropp et al. 2019, scikit-learn, fbpca, RandLAPACK, Higham's
gallery and Martinsson's lectures; users reported the edge cases.
"""

import functools

import numpy as np

from benchmarks.run.matrices import SPECTRA, make_of_spectrum


def random_orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def diagonal(rng, m, n, spectrum):
    """The spectrum on the diagonal: singular vectors as coherent as can be."""
    a = np.zeros((m, n))
    k = min(m, n)
    a[np.arange(k), np.arange(k)] = spectrum(np.arange(1, k + 1))
    return a


def plateau(decay, width=10):
    """Ones, then a decay that starts at 2: the sets of Tropp et al."""
    return lambda i: np.where(i <= width, 1.0, decay(np.maximum(i - width + 1, 2)))


def rank_ten_with_noise(rng, m, n, size):
    noise = rng.standard_normal((m, n)) @ rng.standard_normal((n, n))
    return diagonal(rng, m, n, lambda i: 1.0 * (i <= 10)) + size / n * noise


def bell_with_tail(i, effective_rank=10, tail=0.5):
    x = (i - 1) / effective_rank
    return (1 - tail) * np.exp(-(x**2)) + tail * np.exp(-0.1 * x)


def tridiagonal_to_the_ninth(rng, m, n):
    a = 2 * np.diag(np.arange(1.0, m + 1))
    a -= np.diag(np.arange(1.0, m), 1) + np.diag(np.arange(1.0, m), -1)
    a = a[:, :n] if n <= m else np.pad(a, ((0, 0), (0, n - m)))
    a /= np.linalg.norm(a, 2)
    for _ in range(2):
        a = a @ (a.T @ a)
    return a[rng.permutation(m)][:, rng.permutation(n)]


def spiked_rows(rng, m, n):
    """Orthonormal columns repeated, half of the rows a hundred times as large."""
    a = np.resize(random_orthonormal(rng, n, n), (m, n))
    a[rng.permutation(m)[: m // 2]] *= 100
    return a


def kahan(rng, m, n, angle=1.2):
    k = min(m, n)
    sine, cosine = np.sin(angle), np.cos(angle)
    upper = np.eye(k) - cosine * np.triu(np.ones((k, k)), 1)
    a = np.zeros((m, n))
    a[:k, :k] = sine ** np.arange(k)[:, None] * upper
    a[np.arange(k), np.arange(k)] += 10 * np.finfo(float).eps * np.arange(k, 0, -1)
    return a


def coherent_top(rng, m, n):
    k = min(m, n)
    u = rng.standard_normal((m, k))
    u[:10] *= 1e3
    v = np.triu(random_orthonormal(rng, n, k).T)
    v[np.arange(10, k), np.arange(10, k)] *= 1e-2
    return np.linalg.qr(u)[0] @ v


def pairs(rng, m, n):
    """An adapter with every singular value twice, above a little noise."""
    u, v = random_orthonormal(rng, m, 8), random_orthonormal(rng, n, 8)
    return (u * np.repeat([4.0, 3.0, 2.0, 1.0], 2)) @ v.T + 1e-3 * rng.standard_normal(
        (m, n)
    )


def of(spectrum):
    return functools.partial(make_of_spectrum, spectrum=spectrum)


def on_diagonal(spectrum):
    return functools.partial(diagonal, spectrum=spectrum)


GALLERY = {
    **SPECTRA,
    **{
        f"low rank, noise {size:g}": functools.partial(rank_ten_with_noise, size=size)
        for size in (1e-4, 1e-2, 1e-1)
    },
    **{
        f"polynomial {p}, diagonal": on_diagonal(plateau(lambda i, p=p: i**-p))
        for p in (0.5, 1.0, 2.0)
    },
    **{
        f"exponential {q}, {kind}": make(plateau(lambda i, q=q: 10.0 ** (-q * (i - 1))))
        for q in (0.01, 0.1, 0.5)
        for kind, make in (("diagonal", on_diagonal), ("rotated", of))
    },
    "bell with tail": of(bell_with_tail),
    "three values": of(
        lambda i: np.select([i == 1, i == 2, i == 3], [1, 0.1, 0.01], 0.0)
    ),
    "tridiagonal": tridiagonal_to_the_ninth,
    "steps": of(lambda i: np.select([i <= 8, i <= 16, i <= 32], [1, 8e-3, 4e-3], 1e-3)),
    "spiked rows": spiked_rows,
    "coherent top": coherent_top,
    "Kahan": kahan,
    **{
        f"one large, {condition:g}": of(
            lambda i, c=condition: np.where(i == 1, 1, 1 / c)
        )
        for condition in (1e2, 1e4, 1e7)
    },
    **{
        f"geometric, {condition:g}": of(lambda i, c=condition: c ** (-(i - 1) / len(i)))
        for condition in (1e2, 1e4, 1e7)
    },
    "one small": of(lambda i: np.where(i == len(i), 1e-7, 1.0)),
    "arithmetic": of(lambda i: 1 - (i - 1) / len(i)),
    "gap": of(lambda i: np.where(i > 20, 0.1, 1.0) / i),
    "root": of(lambda i: i**-0.5),
    "pairs": pairs,
    "repeated columns": lambda rng, m, n: np.tile(
        rng.standard_normal((m, n // 4)), (1, 4)
    ),
    "one row counts": lambda rng, m, n: np.eye(m)[:, :1] @ rng.standard_normal((1, n)),
    "one denormal": lambda rng, m, n: (
        np.eye(m, n) * np.where(np.arange(n) == 0, 1e-42, 1.0)
    ),
}
