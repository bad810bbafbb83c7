"""The values that codes of few bits stand for."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

# Quantiles of the normal distribution, seven below zero and eight above: Dettmers et
# al., 2023, appendix E.
_NF4_BELOW = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
)
_NF4_ABOVE = (
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_LEVELS = (*_NF4_BELOW, 0.0, *_NF4_ABOVE)


@functools.cache
def list_nf4_midpoints() -> np.ndarray:
    """Return the 15 float32 bounds between neighbouring levels."""
    levels = np.array(NF4_LEVELS, np.float32)
    return (levels[:-1] + levels[1:]) / np.float32(2)


@functools.cache
def list_nf4_pairs() -> np.ndarray:
    """Return float32 [256, 2]: the levels of both halves of each byte, high half first.

    One lookup of a byte is twice as fast as two lookups of its halves.
    """
    high, low = np.divmod(np.arange(256), 16)
    return np.array(NF4_LEVELS, np.float32)[np.stack([high, low], axis=-1)]


@functools.cache
def list_fp8_levels() -> np.ndarray:
    """Return the 256 float32 values of the bytes of e4m3; two of them are NaN."""
    return np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)


@functools.cache
def list_dynamic_levels() -> np.ndarray:
    """Return the 256 float32 levels of 8 bits with a dynamic exponent, ascending.

    Each decade from 1e-6 to 1 is divided into twice as many intervals as the one below
    it. The levels are the centres of the intervals with both signs, 0 and 1. They are
    within 6e-8 of the ones of bitsandbytes.

    Source: Dettmers, "8-bit approximations for parallelism in deep learning", 2015.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2**decade + 1, dtype=np.float32)
        centres = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade - 6)) * centres
        levels += [*scaled, *-scaled]
    return np.sort(np.array(levels, np.float32))


@functools.cache
def list_dynamic_midpoints() -> np.ndarray:
    """Return the 255 float32 bounds between neighbouring dynamic levels."""
    levels = list_dynamic_levels()
    return (levels[:-1] + levels[1:]) / np.float32(2)
