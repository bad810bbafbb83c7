"""The safetensors format, bfloat16 included, as NumPy arrays.

The NumPy reader of the library does not know bfloat16, so the bytes are viewed here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return {name: array} of a safetensors file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, or holds a dtype that NumPy does not know.
    """
    import safetensors  # on use, which keeps the import of jlora fast

    with open(path, "rb") as file:
        content = file.read()
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: must be a whole safetensors file, got one that cannot be read "
            f"({error}). Copy or download it again."
        ) from None
    return {name: _view_entry(path, name, entry) for name, entry in entries}


def _view_entry(
    path: str | os.PathLike[str], name: str, entry: Mapping[str, Any]
) -> np.ndarray:
    """Return the array of one entry: its dtype's name, its shape and its bytes."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"{path}: must hold dtypes that NumPy knows, got {entry['dtype']} at "
            f"{name}. Convert it first."
        )
    # Copy to a bytearray, or the array would be read-only.
    flat = np.frombuffer(bytearray(entry["data"]), dtype=_DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])


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
