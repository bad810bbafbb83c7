"""The formats of few bits: `nf4`, `int8`, `int4`, `fp8`.

Their encodings are imported on use: a program without quantised bases does not wait for
them.
"""

from __future__ import annotations

from typing import Any

from jlora import _checks
from jlora.quantization.base import Format


def nf4(*, block_size: int = 64, double_quant: bool = True) -> Format:
    """Return NF4: 16 levels, the quantiles of a normal distribution, 4 bits each.

    With double quantisation, it takes 4.13 bits for each number in large matrices.
    Codes and scales are the ones of bitsandbytes if `block_size` divides the number of
    inputs.

    Args:
        block_size: static, inputs of one output that share one scale, ≥ 1.
        double_quant: static, whether the scales are stored in 8 bits instead of 32.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Accuracy: half of the widest gap, 0.152 of the largest entry of each block; relative
        error of a Gaussian matrix 0.092. Double quantisation changes a scale by up to
        0.7 % of the largest distance of 256 scales from the mean of all.

    Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA", 2023, section 3 and
        appendix E.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[1.0], [-0.9], [0.02]])
        >>> format = jlora.quantization.nf4()
        >>> jlora.quantization.quantize(w, format).dequantize().tolist()
        [[1.0], [-1.0], [0.0]]
    """
    from jlora.quantization.encodings import NF4

    size = _checks.check_integer(block_size, "block_size")
    if not isinstance(double_quant, bool):
        raise TypeError(
            f"`double_quant` must be True or False, got {type(double_quant).__name__}. "
            "Pass one of them."
        )
    return NF4(size, double_quant)


def int8(*, block_size: int | None = None) -> Format:
    """Return int8: integers from -127 to 127 times the largest entry of each block.

    Args:
        block_size: static, inputs of one output that share one scale, ≥ 1. None: all.

    Raises:
        TypeError, ValueError: a block size that is no integer, or below 1.

    Accuracy: within 1/254 of the largest entry of each block; relative error of a
        Gaussian matrix 0.008.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[127.0], [0.4], [-3.6]])
        >>> format = jlora.quantization.int8()
        >>> jlora.quantization.quantize(w, format).dequantize().tolist()
        [[127.0], [0.0], [-4.0]]
    """
    from jlora.quantization.encodings import Int8

    return Int8(_check_block_size(block_size))


def int4(*, block_size: int | None = 128) -> Format:
    """Return int4: 16 evenly spaced levels from the least to the largest entry.

    Args:
        block_size: static, inputs of one output that share scale and zero, ≥ 1. None:
            all.

    Raises:
        TypeError, ValueError: a block size that is no integer, or below 1.

    Accuracy: within 0.62 of a step, which is a fifteenth of the range of the block;
        zero is exact. Relative error of a Gaussian matrix 0.10.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[15.0], [0.4], [7.6]])
        >>> format = jlora.quantization.int4()
        >>> jlora.quantization.quantize(w, format).dequantize().tolist()
        [[15.0], [0.0], [8.0]]
    """
    from jlora.quantization.encodings import Int4

    return Int4(_check_block_size(block_size))


def fp8(*, block_size: int | None = None) -> Format:
    """Return fp8: floating numbers of 8 bits, e4m3, times a power of two per block.

    Args:
        block_size: static, inputs of one output that share one scale, ≥ 1. None: all.

    Raises:
        TypeError, ValueError: a block size that is no integer, or below 1.

    Accuracy: 1/16 of each entry, and 2⁻¹⁷ of the largest entry of its block; relative
        error of a Gaussian matrix 0.026.

    Source: Micikevicius et al., "FP8 formats for deep learning", 2022. Differs: the
        scale is a power of two, which loses no accuracy and makes a second round trip
        exact, up to 2⁻¹⁷ of the largest entry of a block.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[100.0], [1.0], [1.05]])
        >>> format = jlora.quantization.fp8()
        >>> jlora.quantization.quantize(w, format).dequantize().tolist()
        [[96.0], [1.0], [1.0]]
    """
    from jlora.quantization.encodings import FP8

    return FP8(_check_block_size(block_size))


FORMATS = {"nf4": nf4, "int8": int8, "int4": int4, "fp8": fp8}


def as_format(value: Any, name: str = "format") -> Format:
    """Return a format: itself, or the one of a name with its defaults."""
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return FORMATS[_checks.check_choice(value, tuple(FORMATS), name)]()
    raise TypeError(
        f"`{name}` must be a format, got {type(value).__name__}. "
        "Pass for example jlora.quantization.nf4()."
    )


def _check_block_size(block_size: int | None) -> int | None:
    if block_size is None:
        return None
    return _checks.check_integer(block_size, "block_size")
