"""Singular values of noise: their edge, their median, the threshold above them.

All for an m×n matrix of independent entries of mean zero and standard deviation `noise`.

Source: Marchenko and Pastur 1967; Gavish and Donoho, "The optimal hard threshold for singular
values is 4/√3", 2014.
"""

import functools

import numpy as np


def marchenko_pastur_edge(m, n, noise):
    """Return the largest singular value of noise alone, (√m + √n) noise, for a large matrix."""
    return noise * (np.sqrt(m) + np.sqrt(n))


def optimal_threshold(m, n, noise):
    """Return λ(β) √max(m, n) noise: to keep what lies above it has the least mean square error."""
    beta = min(m, n) / max(m, n)
    root = np.sqrt(beta**2 + 14 * beta + 1)
    return (
        np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))
        * np.sqrt(max(m, n))
        * noise
    )


def estimate_noise(values, shape, norm, find_threshold):
    """Return the standard deviation of the noise below the leading singular values.

    From the median where all values are there. From leading ones, what they leave of the norm:
    the values that stand out by `find_threshold(noise)` are taken for signal, what is left for
    noise, until that agrees with itself.

    Raises:
        ValueError: all values given stand out, so that nothing is seen of the noise.
    """
    m, n = shape
    if len(values) == min(m, n):
        return float(np.median(values)) / np.sqrt(
            max(m, n) * median_of_squares(min(m, n) / max(m, n))
        )
    tails = np.maximum(norm**2 - np.concatenate([[0.0], np.cumsum(values**2)]), 0)
    count = len(values)
    for _ in range(len(values) + 1):
        noise = np.sqrt(tails[count] / ((m - count) * (n - count)))
        above = int(np.sum(values > find_threshold(noise)))
        if above >= count:
            break
        count = above
    if count == len(values):
        raise ValueError(
            f"`a` must reach down into the noise for it to be estimated, got {len(values)} "
            f"singular values of {min(m, n)}, all above it. Pass more of them, or `noise`."
        )
    return float(noise)


@functools.cache
def median_of_squares(beta):
    """Return the median of the Marchenko-Pastur law of ratio β ≤ 1: of σ² / (max(m, n) noise²)."""
    lower, upper = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    # x = middle - half cos(t): the roots at both edges are smooth in t.
    t = (np.arange(200_000) + 0.5) * np.pi / 200_000
    half = (upper - lower) / 2
    x = (upper + lower) / 2 - half * np.cos(t)
    mass = np.cumsum((half * np.sin(t)) ** 2 / x)
    return float(np.interp(0.5 * mass[-1], mass, x))
