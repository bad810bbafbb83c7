"""Quantisers as round trips: the nearest weight that a quantised base can hold."""

import functools

import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import safe_divide, to_compute

# Quantiles of the normal distribution, seven below zero and eight above: Dettmers et al. 2023.
_NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_INT8_STEPS = 127


def quantize_int8(w, block_size=None):
    """Return w rounded to 8-bit integers times the largest of each column, or of each block.

    Args:
        w: [..., m, n] real floating.
        block_size: static, inputs that share one scale. None: all m of them.

    Returns:
        [..., m, n] in the dtype of w: what a base in int8 stands for.

    Raises:
        TypeError: w is no real floating array.
        ValueError: a block size below 1.

    Accuracy: within 1/254 of the largest of each block. NaN or Inf make their block NaN.

    Gradients: zero almost everywhere.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.quantization.quantize_int8(jnp.array([[127.0], [0.4], [-3.6]])).tolist()
        [[127.0], [0.0], [-4.0]]
    """
    w = _checks.check_matrix(w, "w")
    size = (
        w.shape[-2]
        if block_size is None
        else _checks.check_integer(block_size, "block_size")
    )
    return _round_blocks(
        w, size, lambda part: jnp.round(part * _INT8_STEPS) / _INT8_STEPS
    )


def quantize_nf4(w, block_size=64):
    """Return w rounded to the 16 levels of NF4 times the largest of each block.

    Args:
        w: [..., m, n] real floating.
        block_size: static, inputs of one output that share one scale.

    Returns:
        [..., m, n] in the dtype of w: what a base in NF4 stands for.

    Raises:
        TypeError: w is no real floating array.
        ValueError: a block size below 1.

    Accuracy: to half of the widest gap, 0.152 of the largest of each block. The scales themselves
        are not quantised. NaN or Inf make their block NaN.

    Gradients: zero almost everywhere.

    Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA", 2023, appendix E.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.quantization.quantize_nf4(jnp.array([[1.0], [-0.9], [0.02]])).tolist()
        [[1.0], [-1.0], [0.0]]
    """
    w = _checks.check_matrix(w, "w")
    size = _checks.check_integer(block_size, "block_size")
    levels = jnp.asarray(_NF4_LEVELS, to_compute(w).dtype)
    between = (levels[1:] + levels[:-1]) / 2
    # Fifteen comparisons of all numbers at once: four times as fast as bisection on a CPU.
    find = functools.partial(jnp.searchsorted, method="compare_all")
    return _round_blocks(w, size, lambda part: levels[find(between, part)])


def _round_blocks(w, size, round_part):
    """Return w with round_part applied to each block of inputs, scaled to ±1."""
    exact, (*batch, m, n) = to_compute(w), w.shape
    missing = -m % size
    padded = jnp.pad(exact, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
    blocks = padded.reshape(*batch, -1, size, n)
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    parts = safe_divide(blocks, jnp.broadcast_to(largest, blocks.shape))
    finite = jnp.isfinite(largest)
    rounded = jnp.where(finite, round_part(parts) * largest, jnp.nan)
    return rounded.reshape(*batch, m + missing, n)[..., :m, :].astype(w.dtype)
