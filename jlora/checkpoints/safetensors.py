"""The dtypes of the safetensors format, and its writer for NumPy arrays."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jlora._types import AnyArray

# In the order of the library's writer: wide items first.
_DTYPES = {
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
    "F32": np.float32,
    "U32": np.uint32,
    "I32": np.int32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "U16": np.uint16,
    "I16": np.int16,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def find_dtype(code: str) -> np.dtype | None:
    """Return the NumPy dtype of one of the format's codes, or None if it has none."""
    return np.dtype(_DTYPES[code]) if code in _DTYPES else None


def find_code(dtype: np.dtype) -> str:
    """Return the format's code of a NumPy dtype that `check_entries` accepts."""
    return _NAMES[dtype.newbyteorder("=")]


def format_header(
    entries: Sequence[tuple[str, str, tuple[int, ...], int]],
) -> bytes:
    """Return the first bytes of a file: the places of tensors in the given order.

    Args:
        entries: (name, code of the dtype, shape, number of bytes) of each tensor.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, code, shape, num_bytes in entries:
        place = [offset, offset + num_bytes]
        fields[name] = {"dtype": code, "shape": list(shape), "data_offsets": place}
        offset += num_bytes
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def check_entries(path: str | os.PathLike[str], arrays: Mapping[str, AnyArray]) -> None:
    """Refuse a dtype or a name that the format does not have."""
    for name, array in arrays.items():
        if name == "__metadata__":
            raise ValueError(
                f"{path}: `arrays` must have other names than '__metadata__', which "
                "safetensors keeps for itself, got it. Rename it."
            )
        if np.dtype(array.dtype).newbyteorder("=") not in _NAMES:
            raise TypeError(
                f"`arrays` must have dtypes that safetensors knows, got {array.dtype} "
                f"at {name}. Cast it, or write an .npz file."
            )


def sort_names(arrays: Mapping[str, AnyArray]) -> list[str]:
    """Return the names in the order of the library: wide dtypes first, then by name.

    So every tensor begins at a multiple of the size of its items.
    """
    places = {code: place for place, code in enumerate(_DTYPES)}
    codes = {name: find_code(np.dtype(array.dtype)) for name, array in arrays.items()}
    return sorted(arrays, key=lambda name: (places[codes[name]], name))


def write_safetensors(
    file: BinaryIO,
    arrays: Mapping[str, AnyArray],
    values: Iterable[np.ndarray] | None = None,
) -> None:
    """Write {name: array}, checked by `check_entries`, to an open binary file.

    Args:
        file: open for writing.
        arrays: of shapes and dtypes to write.
        values: the arrays in the order of `sort_names`. None: `arrays` hold them.
    """
    names = sort_names(arrays)
    entries = []
    for name in names:
        dtype, shape = np.dtype(arrays[name].dtype), tuple(arrays[name].shape)
        num_bytes = math.prod(shape) * dtype.itemsize
        entries.append((name, find_code(dtype), shape, num_bytes))
    file.write(format_header(entries))

    if values is None:
        values = (np.asarray(arrays[name]) for name in names)
    each = iter(values)
    for name in names:
        # Without a variable: it would keep the array while the next one is read.
        _write_array(file, next(each), np.dtype(arrays[name].dtype))


def _write_array(file: BinaryIO, array: np.ndarray, dtype: np.dtype) -> None:
    flat = np.ascontiguousarray(array, dtype.newbyteorder("<")).reshape(-1)
    file.write(flat.view(np.uint8).data)
