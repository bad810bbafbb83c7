"""Round trips: the nearest weight that a low-precision format can hold."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import safe_divide, to_compute
from jlora._types import AnyArray, Array, Float
from jlora.quantization.blocks import find_largest
from jlora.quantization.levels import NF4_LEVELS

_INT8_STEPS = 127


def quantize_int8(
    w: Float[AnyArray, "*batch m n"], block_size: int | None = None
) -> Float[Array, "*batch m n"]:
    """Return w rounded to 8-bit integers times the largest entry of each block.

    Args:
        w: real floating.
        block_size: static, inputs that share one scale. None: all m of them.

    Returns:
        The values of a base in int8, in the dtype of w.

    Raises:
        TypeError: w is no real floating array.
        ValueError: a block size below 1.

    Accuracy: within 1/254 of the largest entry of each block. NaN or Inf make their
        block NaN.

    Gradients: zero almost everywhere.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[127.0], [0.4], [-3.6]])
        >>> jlora.quantization.quantize_int8(w).tolist()
        [[127.0], [0.0], [-4.0]]
    """
    w = _checks.check_matrix(w, "w")
    size = w.shape[-2]
    if block_size is not None:
        size = _checks.check_integer(block_size, "block_size")

    def round_part(part: Array) -> Array:
        return jnp.round(part * _INT8_STEPS) / _INT8_STEPS

    return _round_blocks(w, size, round_part)


def quantize_nf4(
    w: Float[AnyArray, "*batch m n"], block_size: int = 64
) -> Float[Array, "*batch m n"]:
    """Return w rounded to the 16 levels of NF4 times the largest entry of each block.

    Args:
        w: real floating.
        block_size: static, inputs of one output that share one scale.

    Returns:
        The values of a base in NF4, in the dtype of w.

    Raises:
        TypeError: w is no real floating array.
        ValueError: a block size below 1.

    Accuracy: half of the widest gap, 0.152 of the largest entry of each block. The
        scales themselves are not quantised. NaN or Inf make their block NaN.

    Gradients: zero almost everywhere.

    Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA", 2023, appendix E.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[1.0], [-0.9], [0.02]])
        >>> jlora.quantization.quantize_nf4(w).tolist()
        [[1.0], [-1.0], [0.0]]
    """
    w = _checks.check_matrix(w, "w")
    size = _checks.check_integer(block_size, "block_size")
    levels = jnp.asarray(NF4_LEVELS, to_compute(w).dtype)
    midpoints = (levels[1:] + levels[:-1]) / 2
    # Fifteen comparisons of all entries at once: four times as fast as bisection on a
    # CPU.
    find = functools.partial(jnp.searchsorted, method="compare_all")
    return _round_blocks(w, size, lambda part: levels[find(midpoints, part)])


def _round_blocks(
    w: Float[Array, "*batch m n"], size: int, round_part: Callable[[Array], Array]
) -> Float[Array, "*batch m n"]:
    """Return w with round_part applied to each block of inputs, scaled to ±1."""
    exact = to_compute(w)
    *batch, m, n = w.shape

    # Pad to whole blocks, and scale each by its largest entry.
    num_missing = -m % size
    padding = [(0, 0)] * len(batch) + [(0, num_missing), (0, 0)]
    num_blocks = (m + num_missing) // size  # -1 would be undefined for an empty batch
    blocks = jnp.pad(exact, padding).reshape(*batch, num_blocks, size, n)
    largest = find_largest(jnp.abs(blocks), -2)
    parts = safe_divide(blocks, jnp.broadcast_to(largest, blocks.shape))

    is_finite = jnp.isfinite(largest)
    rounded = jnp.where(is_finite, round_part(parts) * largest, jnp.nan)
    whole = rounded.reshape(*batch, m + num_missing, n)
    return whole[..., :m, :].astype(w.dtype)
