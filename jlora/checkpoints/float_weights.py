"""Weights in floating point, and the scales that belong to the ones in fp8."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora._types import Float

_PLAIN = ("float16", "bfloat16", "float32", "float64")
_FP8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALES = (*_PLAIN, "float8_e8m0fnu")

# DeepSeek's and Hugging Face's blocks; compressed-tensors and ModelOpt. Both multiply.
_SUFFIXES = ("_scale_inv", "_scale")

# Entries of a weight that are scaled at once; one temporary of this size exists.
_BLOCK = 2**20


class Scale(NamedTuple):
    """The scales of a weight, one for each block of its entries."""

    values: Float[np.ndarray, ...]  # as many axes as the weight
    block: tuple[int, ...]  # entries along each axis that share a scale


def is_floating(dtype: str) -> bool:
    """Return whether a dtype is floating of 16 to 64 bits."""
    return dtype in _PLAIN


def is_fp8(dtype: str) -> bool:
    """Return whether a dtype is an fp8 of weights, which need a scale."""
    return dtype in _FP8


def check_changeable(file: pathlib.Path, name: str, dtype: str) -> None:
    """Refuse to change a weight that is not floating of 16 to 64 bits."""
    if not is_floating(dtype):
        raise ValueError(
            f"{file}: {name} must be floating of 16 to 64 bits to be changed, got "
            f"{dtype}. Dequantise the model first."
        )


def find_scales(name: str, names: Container[str]) -> list[str]:
    """Return the tensors of a checkpoint that may hold the scale of a weight."""
    return [f"{name}{suffix}" for suffix in _SUFFIXES if f"{name}{suffix}" in names]


def read_block_size(
    config: Mapping[str, Any], path: pathlib.Path
) -> tuple[int, int] | None:
    """Return `weight_block_size` of a config.json, or None if it does not say.

    Raises:
        ValueError: it is no pair of positive integers.
    """
    settings = config.get("quantization_config")
    given = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if given is None:
        return None
    is_list = isinstance(given, list) and all(type(b) is int and b > 0 for b in given)
    if not is_list or len(given) != 2:
        raise ValueError(
            f"{path}: `weight_block_size` must be two positive integers, got "
            f"{given!r}. Correct config.json."
        )
    return given[0], given[1]


def make_scale(
    values: np.ndarray,
    name: str,
    shape: Sequence[int],
    block_size: tuple[int, int] | None,
) -> Scale:
    """Return the scale of a weight with the blocks that its shape stands for.

    Args:
        values: the tensor of the checkpoint: one number, one for each row, or one for
            each block.
        name: of that tensor, for the error, and its suffix.
        shape: of the weight.
        block_size: of the last two axes, from config.json. None: from the shapes.

    Raises:
        ValueError: scales that are no floating point, or of a shape that stands for no
            blocks, or for several sizes of them.
    """
    if values.dtype.name not in _SCALES:
        raise ValueError(
            f"{name} must be floating, got {values.dtype}. Dequantise the model with "
            "the library that wrote it."
        )
    values = _align(values, shape)
    is_block = name.endswith(_SUFFIXES[0]) and values.size > 1
    found = _find_block(values.shape, shape, block_size, is_block)
    if found is None:
        size = "no size" if block_size is None else f"blocks of {list(block_size)}"
        raise ValueError(
            f"{name} must have one scale for each block of a weight of shape "
            f"{tuple(shape)}, got shape {values.shape} and {size} in config.json. Set "
            "`weight_block_size` of `quantization_config` in config.json."
        )
    return Scale(values, found)


def _align(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the scales with the axes of the weight; a vector has one for each row."""
    if values.size == 1 and values.ndim <= 1:
        return values.reshape((1,) * len(shape))
    if values.ndim == 1 and shape and len(values) == shape[0]:
        return values.reshape(-1, *(1,) * (len(shape) - 1))
    return values


def _find_block(
    grid: Sequence[int],
    shape: Sequence[int],
    block_size: tuple[int, int] | None,
    is_block: bool,
) -> tuple[int, ...] | None:
    """Return the entries along each axis that share a scale, or None."""
    if len(grid) != len(shape):
        return None
    sizes = [_divide(n, count) for n, count in zip(shape, grid, strict=True)]
    if block_size is not None and len(shape) >= 2:
        ends = zip(shape[-2:], block_size, strict=True)
        if tuple(math.ceil(n / b) for n, b in ends) == tuple(grid[-2:]):
            sizes[-2:] = block_size
        elif is_block:
            return None  # by the shapes it would be another size than config.json's
    known = [size for size in sizes if size is not None]
    return tuple(known) if len(known) == len(sizes) else None


def _divide(size: int, count: int) -> int | None:
    """Return the length of the blocks of an axis, if only one is possible.

    Blocks need not divide the axis: 3 blocks of 300 entries may be of 100 to 149. At
    most one of the possible lengths is a power of two, as all of the formats use.
    """
    if count == 1:
        return max(size, 1)
    if count == size:
        return 1
    if count == 0 or size % count:
        return None
    length = size // count
    return length if length & (length - 1) == 0 else None


def scale_rows(rows: np.ndarray, scale: Scale, start: int) -> None:
    """Multiply the rows of a weight by their scales, in place.

    Args:
        rows: in float32 or float64, from row `start` of the weight on.
        scale: of the whole weight.
    """
    values = scale.values.astype(rows.dtype)
    if values.size == 1:
        rows *= values.reshape(())
        return

    step = max(1, _BLOCK // max(math.prod(rows.shape[1:]), 1))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        factor = values[(start + first + np.arange(len(part))) // scale.block[0]]
        for axis in range(1, rows.ndim):
            if factor.shape[axis] > 1:
                index = np.arange(rows.shape[axis]) // scale.block[axis]
                factor = factor.take(index, axis)
        part *= factor
