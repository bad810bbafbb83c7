"""Quantised weights as transformers writes them with bitsandbytes: NF4 and int8."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora.checkpoints.quantized_files import DTYPES, check_sizes, read_state, to_bytes
from jlora.quantization.base import Format
from jlora.quantization.formats import int8, nf4
from jlora.quantization.levels import NF4_LEVELS, list_dynamic_levels
from jlora.quantization.quantized_array import QuantizedArray

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NESTED_SIZE = 256
# The levels of 8 bits in jlora and in bitsandbytes differ by rounding.
_CLOSE = 1e-6

Read = Callable[[str], np.ndarray]


class _State(NamedTuple):
    """The checked description of a weight in 4 bits."""

    shape: tuple[int, int]  # [outputs, inputs]
    block_size: int  # of the flat weight
    nested_size: int | None
    nested_offset: float
    dtype: str


def find_kind(name: str, names: Container[str]) -> str | None:
    """Return "nf4", "fp4" or "int8" for a weight of bitsandbytes, None for others."""
    for kind in _KINDS:
        if f"{name}{_STATE}{kind}" in names:
            return kind
    is_int8 = name.endswith("weight") and _name_scales(name) in names
    return "int8" if is_int8 else None


def find_parts(name: str, kind: str, names: Container[str]) -> list[str]:
    """Return the tensors that belong to a weight."""
    if kind == "int8":
        parts = [_name_scales(name), f"{name}_format"]
    else:
        parts = [f"{name}.{part}" for part in _PARTS] + [f"{name}{_STATE}{kind}"]
    return [part for part in parts if part in names]


def read_weight(
    name: str, kind: str, read: Read, dtype: str, owner: object
) -> QuantizedArray:
    """Return a weight of bitsandbytes; its codes are not changed.

    Args:
        name: of the weight.
        kind: from `find_kind`.
        read: function from a name to the tensor.
        dtype: that the array stands for; a weight in 4 bits names its own.
        owner: the file, for messages.

    Raises:
        ValueError: FP4, another table of levels, an odd number of inputs, or tensors
            that do not fit together.
    """
    if kind == "int8":
        return _read_int8(name, read, dtype, owner)
    if kind != "nf4":
        raise ValueError(
            f"{owner}: {name} must be in NF4 or int8, got {kind}, whose levels jlora "
            "does not have. Load the model with transformers, and quantise it to NF4."
        )
    return _read_nf4(name, read, owner)


def list_tensors(name: str, array: QuantizedArray) -> dict[str, np.ndarray]:
    """Return {name: tensor} of an array that `why_not_writable` accepts."""
    from jlora.quantization.scales import NestedScales

    codes = np.asarray(array.codes)
    if array.format.name == "int8":
        return {
            name: codes,
            _name_scales(name): np.asarray(array.scales)[:, 0],
            f"{name}_format": np.zeros((), np.uint8),
        }

    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": array.format.block_size,
        "dtype": np.dtype(array.dtype).name,
        "shape": list(array.shape),
    }
    levels = np.array(NF4_LEVELS, np.float32)
    tensors = {name: codes.reshape(-1, 1), f"{name}.quant_map": levels}
    if isinstance(array.scales, NestedScales):
        nested = array.scales
        state |= {
            "nested_blocksize": _NESTED_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(nested.offset),
        }
        tensors[f"{name}.absmax"] = np.asarray(nested.codes).reshape(-1)
        tensors[f"{name}.nested_absmax"] = np.asarray(nested.largest)
        tensors[f"{name}.nested_quant_map"] = list_dynamic_levels()
    else:
        tensors[f"{name}.absmax"] = np.asarray(array.scales).reshape(-1)
    tensors[f"{name}{_STATE}nf4"] = to_bytes(state)
    return tensors


def _name_scales(name: str) -> str:
    return f"{name.removesuffix('weight')}SCB"


def _read_int8(name: str, read: Read, dtype: str, owner: object) -> QuantizedArray:
    codes, scales = read(name), read(_name_scales(name))
    if codes.dtype != np.int8 or codes.ndim != 2 or scales.shape != codes.shape[:1]:
        raise ValueError(
            f"{owner}: {name} must be int8 [outputs, inputs] with a scale for each "
            f"output, got {codes.dtype} {codes.shape} and scales {scales.shape}. "
            "Download the model again."
        )
    return QuantizedArray(
        jnp.asarray(codes),
        jnp.asarray(scales, jnp.float32)[:, None],
        None,
        int8(),
        np.dtype(jnp.dtype(dtype)),
        "oi",
        codes.shape,
    )


def _read_nf4(name: str, read: Read, owner: object) -> QuantizedArray:
    description = read_state(read(f"{name}{_STATE}nf4"), owner, name)
    state = _check_state(description, owner, name)
    levels = read(f"{name}.quant_map")
    if not np.array_equal(levels, np.array(NF4_LEVELS, np.float32)):
        raise ValueError(
            f"{owner}: {name}.quant_map must hold the levels of NF4, got others. "
            "Quantise the model again with bitsandbytes."
        )

    num_outputs, num_inputs = state.shape
    packed, absmax = read(name), read(f"{name}.absmax")
    num_blocks = -(-num_outputs * num_inputs // state.block_size)
    if packed.size != num_outputs * num_inputs // 2 or absmax.size != num_blocks:
        raise ValueError(
            f"{owner}: {name} must have codes and scales of one size, got "
            f"{packed.size} bytes and {absmax.size} scales for shape {state.shape} and "
            f"blocks of {state.block_size}. Download the model again."
        )

    codes = packed.reshape(num_outputs, num_inputs // 2)
    block_size = math.gcd(num_inputs, state.block_size)
    scales = _read_scales(name, absmax.reshape(-1), state, read)
    if block_size < state.block_size:
        # Blocks of the flat weight cross its rows: each part of one has its scale.
        starts = np.arange(0, num_outputs * num_inputs, block_size)
        scales = np.asarray(scales)[starts // state.block_size]
    shape = (num_outputs, num_inputs // block_size)
    array = QuantizedArray(
        jnp.asarray(codes, jnp.uint8),
        _shape_scales(scales, shape),
        None,
        nf4(block_size=block_size, double_quant=not isinstance(scales, np.ndarray)),
        np.dtype(jnp.dtype(state.dtype)),
        "oi",
        state.shape,
    )
    check_sizes(array, owner, name)
    return array


def _shape_scales(scales: Any, shape: tuple[int, int]) -> Any:
    if isinstance(scales, np.ndarray):
        return jnp.asarray(scales.reshape(shape))
    return dataclasses.replace(scales, codes=scales.codes.reshape(shape))


def _read_scales(name: str, absmax: np.ndarray, state: _State, read: Read) -> Any:
    """Return flat scales: nested ones if jlora's levels are the file's, else floats."""
    from jlora.quantization.scales import NestedScales

    if state.nested_size is None:
        return absmax.astype(np.float32)
    largest = read(f"{name}.nested_absmax").reshape(-1)
    levels = read(f"{name}.nested_quant_map")
    is_known = levels.shape == (256,) and np.allclose(
        levels, list_dynamic_levels(), rtol=0, atol=_CLOSE
    )
    crosses_rows = state.shape[1] % state.block_size != 0
    if is_known and state.nested_size == _NESTED_SIZE and not crosses_rows:
        offset = jnp.float32(state.nested_offset)
        return NestedScales(jnp.asarray(absmax), jnp.asarray(largest), offset)
    owners = np.arange(absmax.size) // state.nested_size
    offset = np.float32(state.nested_offset)
    return levels[absmax].astype(np.float32) * largest[owners] + offset


def _check_state(state: Mapping[str, Any], owner: object, name: str) -> _State:
    shape: Any = state.get("shape")
    size: Any = state.get("blocksize")
    nested: Any = state.get("nested_blocksize")
    is_shape = isinstance(shape, list) and len(shape) == 2
    sizes = [*(shape if is_shape else []), size, 1 if nested is None else nested]
    is_known = all(type(each) is int and each > 0 for each in sizes)
    dtype: Any = state.get("dtype")
    if not is_shape or not is_known or dtype not in DTYPES:
        raise ValueError(
            f"{owner}: {name} must have a quant_state with a shape of two axes, a "
            f"blocksize and a floating dtype, got {dict(state)}. Download the model "
            "again."
        )
    if shape[1] % 2:
        raise ValueError(
            f"{owner}: {name} must have an even number of inputs, got {shape[1]}: a "
            "byte would hold codes of two outputs. Load it with transformers, and "
            "quantise it again."
        )
    offset = float(state.get("nested_offset", 0.0))
    return _State((shape[0], shape[1]), size, nested, offset, dtype)


def why_not_writable(format: Format, layout: str, num_inputs: int) -> str | None:
    """Return why bitsandbytes cannot hold such a weight, None if it can."""
    if format.name not in ("nf4", "int8"):
        return f"is to be stored in {format.label}"
    if layout != "oi":
        return "is stored as [inputs, outputs]"
    if num_inputs % format.find_block_size(num_inputs):
        return f"has {num_inputs} inputs, no multiple of {format.block_size}"
    if format.name == "int8" and format.find_block_size(num_inputs) != num_inputs:
        return "has several scales for one output"
    return None
