"""Singular values of noise: their edge, their median, and the best threshold.

All for an m×n matrix of independent entries of mean zero and standard deviation
`noise`.

Source: Marchenko and Pastur 1967; Gavish and Donoho, "The optimal hard threshold for
singular values is 4/√3", 2014.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from jlora._types import Float


def marchenko_pastur_edge(m: float | int, n: float | int, noise: float) -> float:
    """Return (√m + √n) noise, the largest singular value of a large noise matrix."""
    return noise * (np.sqrt(m) + np.sqrt(n))


def optimal_threshold(m: float | int, n: float | int, noise: float) -> float:
    """Return λ(β) √max(m, n) noise, with β = min(m, n) / max(m, n).

    Keeping the singular values above it has the least mean square error.
    """
    beta = min(m, n) / max(m, n)
    root = np.sqrt(beta**2 + 14 * beta + 1)
    factor = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
    return factor * np.sqrt(max(m, n)) * noise


def estimate_noise(
    values: Float[np.ndarray, " k"],
    shape: tuple[int, int],
    norm: float,
    find_threshold: Callable[[float], float],
) -> float:
    """Return the standard deviation of the noise in the entries of a matrix.

    If `values` holds all singular values, the median gives the noise. Otherwise iterate
    to a fixed point: values above the threshold are signal, and the remaining energy
    estimates the noise.

    Args:
        values: singular values in descending order, all or the leading ones.
        shape: (m, n) of the matrix.
        norm: Frobenius norm of the matrix.
        find_threshold: function from the noise to the threshold for signal.

    Raises:
        ValueError: all given values are signal, so none tells the noise.
    """
    m, n = shape
    if len(values) == min(m, n):
        unit = max(m, n) * median_of_squares(min(m, n) / max(m, n))
        return float(np.median(values)) / np.sqrt(unit)

    # tails[k] is the energy without the k leading values.
    tails = np.maximum(norm**2 - np.concatenate([[0.0], np.cumsum(values**2)]), 0)
    num_signal, noise = len(values), 0.0
    for _ in range(len(values) + 1):
        noise = np.sqrt(tails[num_signal] / ((m - num_signal) * (n - num_signal)))
        num_above = int(np.sum(values > find_threshold(noise)))
        if num_above >= num_signal:
            break
        num_signal = num_above

    if num_signal == len(values):
        raise ValueError(
            f"`a` must reach down into the noise for it to be estimated, got "
            f"{len(values)} singular values of {min(m, n)}, all above it. "
            "Pass more of them, or `noise`."
        )
    return float(noise)


@functools.cache
def median_of_squares(beta: float | int) -> float:
    """Return the median of σ² / (max(m, n) noise²) for large m, n and β = m/n ≤ 1.

    That is the median of the Marchenko-Pastur law with ratio β.
    """
    lower, upper = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2

    # Substitute x = middle - half cos(t): the roots at both edges are smooth in t.
    t = (np.arange(200_000) + 0.5) * np.pi / 200_000
    half = (upper - lower) / 2
    x = (upper + lower) / 2 - half * np.cos(t)
    mass = np.cumsum((half * np.sin(t)) ** 2 / x)
    return float(np.interp(0.5 * mass[-1], mass, x))
