"""Quantised arrays as tensors of a file, in a scheme that holds every one of them.

The tensor of an array holds its codes. Beside it are its scales, and a description in
JSON: `<name>.scales`, `<name>.quantized`, ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._types import AnyArray
from jlora.checkpoints.json_files import parse_json
from jlora.quantization.base import Format
from jlora.quantization.formats import FORMATS
from jlora.quantization.quantized_array import QuantizedArray

STATE = ".quantized"  # ends the name of the tensor that describes the others
_PARTS = ("scales", "scales_largest", "scales_offset", "zeros")
DTYPES = ("float32", "bfloat16", "float16")  # that arrays stand for


def list_tensors(name: str, array: QuantizedArray) -> dict[str, AnyArray]:
    """Return {name: array} of the tensors that hold a quantised array."""
    from jlora.quantization.scales import NestedScales

    if array.format.name not in FORMATS:
        raise TypeError(
            f"`arrays` must hold formats of jlora, got {array.format.label} at {name}. "
            "Dequantise it first."
        )
    state = {
        "format": array.format.name,
        **_list_settings(array.format),
        "dtype": np.dtype(array.dtype).name,
        "layout": array.layout,
        "axes": list(array.axes),
    }
    tensors: dict[str, Any] = {name: array.codes, f"{name}{STATE}": to_bytes(state)}
    scales = array.scales
    if isinstance(scales, NestedScales):
        tensors[f"{name}.scales"] = scales.codes
        tensors[f"{name}.scales_largest"] = scales.largest
        tensors[f"{name}.scales_offset"] = scales.offset
    else:
        tensors[f"{name}.scales"] = scales
    if array.zeros is not None:
        tensors[f"{name}.zeros"] = array.zeros
    return tensors


def find_parts(name: str, names: Mapping[str, Any]) -> list[str]:
    """Return the tensors that belong to a quantised array of our own scheme."""
    found = [f"{name}.{part}" for part in _PARTS]
    return [f"{name}{STATE}", *(each for each in found if each in names)]


def join_tensors(
    name: str, tensors: Mapping[str, np.ndarray], owner: object
) -> QuantizedArray:
    """Return the quantised array of its tensors.

    Args:
        name: of the array.
        tensors: by name, with at least everything that `find_parts` lists.
        owner: the file, for messages.

    Raises:
        ValueError: a description that is damaged, or tensors that do not fit it.
    """
    from jlora.quantization.scales import NestedScales

    state = read_state(tensors[f"{name}{STATE}"], owner, name)
    format, layout, axes = _read_format(state, owner, name)
    parts = {part: tensors.get(f"{name}.{part}") for part in _PARTS}
    if parts["scales"] is None:
        raise ValueError(
            f"{owner}: {name} is quantised and must have the tensor {name}.scales, got "
            "none. Write the file again."
        )

    scales: Any = jnp.asarray(parts["scales"])
    if parts["scales_offset"] is not None and parts["scales_largest"] is not None:
        largest, offset = parts["scales_largest"], parts["scales_offset"]
        scales = NestedScales(scales, jnp.asarray(largest), jnp.asarray(offset))
    zeros = None if parts["zeros"] is None else jnp.asarray(parts["zeros"])
    dtype = np.dtype(jnp.dtype(state["dtype"]))
    codes = jnp.asarray(tensors[name])
    array = QuantizedArray(codes, scales, zeros, format, dtype, layout, axes)
    check_sizes(array, owner, name)
    return array


def check_sizes(array: QuantizedArray, owner: object, name: str) -> None:
    """Refuse codes and scales whose sizes do not belong together."""
    from jlora.quantization.scales import NestedScales

    codes, scales = array.codes, array.scales
    is_nested = isinstance(scales, NestedScales)
    shape = scales.codes.shape if is_nested else scales.shape
    num_inputs, num_outputs = array.num_inputs, array.num_outputs
    num_bytes = -(-num_inputs // array.format.codes_per_byte)
    num_blocks = -(-num_inputs // max(array.format.find_block_size(num_inputs), 1))

    expected = (*codes.shape[:-2], num_outputs, num_blocks)
    sizes = dict(zip(array.layout, array.axes, strict=True))
    fits = codes.ndim >= 2 and codes.shape[-1] == num_bytes and shape == expected
    if array.layout in ("io", "oi"):
        fits = fits and sizes["o"] == num_outputs
    if is_nested:
        num_nested = -(-num_outputs * num_blocks // 256)
        fits = fits and scales.largest.shape == (*codes.shape[:-2], num_nested)
        fits = fits and scales.offset.shape == codes.shape[:-2]
    if not fits:
        raise ValueError(
            f"{owner}: {name} must have codes and scales of one size, got codes "
            f"{codes.shape} and scales {shape} for axes {array.axes} in "
            f"{array.format.label}. Write the file again."
        )


def to_bytes(state: Mapping[str, Any]) -> np.ndarray:
    """Return a description as a tensor of its JSON text."""
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def read_state(tensor: np.ndarray, owner: object, name: str) -> dict[str, Any]:
    """Return the description in a tensor of JSON text."""
    return parse_json(np.asarray(tensor, np.uint8).tobytes(), f"{owner}: {name}")


def _list_settings(format: Format) -> dict[str, Any]:
    return {key: getattr(format, key) for key in format.__dataclass_fields__}


def _read_format(
    state: Mapping[str, Any], owner: object, name: str
) -> tuple[Format, str, tuple[int, ...]]:
    """Return (format, layout, axes) of a description."""
    make = FORMATS.get(str(state.get("format")))
    layout: Any = state.get("layout")
    axes: Any = state.get("axes")
    is_layout = isinstance(layout, str) and set(layout) <= set("bio")
    is_axes = isinstance(axes, list) and all(type(size) is int for size in axes)
    if (
        make is None
        or state.get("dtype") not in DTYPES
        or not (is_layout and is_axes and len(layout) == len(axes))
    ):
        raise ValueError(
            f"{owner}: {name} must have a description with a known format, dtype, "
            f"layout and axes, got {dict(state)}. Write the file again with this "
            "version of jlora."
        )
    settings = {
        key: state[key] for key in ("block_size", "double_quant") if key in state
    }
    try:
        return make(**settings), layout, tuple(axes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: {name}: {error}") from None
