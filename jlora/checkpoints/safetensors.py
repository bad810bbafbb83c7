"""The dtypes of the safetensors format, and its writer for NumPy arrays."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
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


def check_entries(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]
) -> None:
    """Refuse a dtype or a name that the format does not have."""
    for name, array in arrays.items():
        if name == "__metadata__":
            raise ValueError(
                f"{path}: `arrays` must have other names than '__metadata__', which "
                "safetensors keeps for itself, got it. Rename it."
            )
        if array.dtype.newbyteorder("=") not in _NAMES:
            raise TypeError(
                f"`arrays` must have dtypes that safetensors knows, got {array.dtype} "
                f"at {name}. Cast it, or write an .npz file."
            )


def write_safetensors(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array}, checked by `check_entries`, to an open binary file."""
    import safetensors.numpy

    entries = {
        name: np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        for name, array in arrays.items()
    }
    # Readers in torch look for this metadata.
    file.write(safetensors.numpy.save(entries, metadata={"format": "pt"}))
