"""NumPy's formats, .npy and .npz, read without trust in a single byte.

A header is checked against the bytes that follow it before memory is taken for them.
Nothing is unpickled.
"""

from __future__ import annotations

import ast
import math
import struct
import zipfile
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # NumPy's own limit; ast.literal_eval needs one


class ArrayHeader(NamedTuple):
    """The dtype and shape of the array in a .npy file, and the order of its bytes."""

    dtype: np.dtype  # as stored; `to_native` gives the array's own
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, num_bytes: int) -> tuple[ArrayHeader, int]:
    """Return the header of a .npy file, and the number of bytes before the data.

    Args:
        file: open at its start.
        num_bytes: of the file, which has to hold the array and nothing else.

    Raises:
        ValueError: the file is damaged, truncated, or holds Python objects.
    """
    start = file.read(len(_MAGIC) + 2)
    if len(start) < len(_MAGIC) + 2 or not start.startswith(_MAGIC):
        raise ValueError("it does not start like a .npy file")
    if start[-2] not in (1, 2, 3):
        raise ValueError(f"version {start[-2]} of the format is not known")

    # The length of the text has two bytes in version 1, and else four.
    code = "<H" if start[-2] == 1 else "<I"
    field = file.read(struct.calcsize(code))
    if len(field) < struct.calcsize(code):
        raise ValueError("the header is truncated")
    (length,) = struct.unpack(code, field)
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes is too long")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("the header is truncated")

    header, header_bytes = _parse_header(text), len(start) + len(field) + length
    if header.num_bytes != num_bytes - header_bytes:
        raise ValueError(
            f"the array needs {header.num_bytes} bytes, and "
            f"{num_bytes - header_bytes} follow"
        )
    return header, header_bytes


def _parse_header(text: bytes) -> ArrayHeader:
    """Return the header that a text describes."""
    entries = ast.literal_eval(text.decode("utf-8").strip())
    if not (
        isinstance(entries, dict)
        and entries.keys() == {"descr", "fortran_order", "shape"}
    ):
        raise ValueError("the header is no dict of descr, fortran_order and shape")

    shape = entries["shape"]
    if not (isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)):
        raise ValueError(f"the shape is {shape!r}")
    if not isinstance(entries["fortran_order"], bool):
        raise ValueError("fortran_order is no bool")

    dtype = np.lib.format.descr_to_dtype(entries["descr"])
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    if dtype.itemsize == 0:
        raise ValueError(f"the items of dtype {dtype} have no bytes")
    if dtype.shape:
        raise ValueError(f"the items of dtype {dtype} are arrays themselves")
    return ArrayHeader(dtype, shape, entries["fortran_order"])


def find_native(dtype: np.dtype) -> np.dtype:
    """Return the dtype in the byte order of the machine; void pairs are bfloat16."""
    if dtype == np.dtype("V2"):
        return np.dtype(ml_dtypes.bfloat16)
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def to_native(array: np.ndarray) -> np.ndarray:
    """Return the array in the dtype of `find_native`."""
    dtype = find_native(array.dtype)
    if dtype == ml_dtypes.bfloat16:
        return array.view(dtype)
    return array if array.dtype == dtype else array.astype(dtype)


def write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array to an open binary file in the .npy format."""
    np.lib.format.write_array(file, array, allow_pickle=False)


def write_npz(file: BinaryIO, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write (name, array) of each to an open binary file in the .npz format."""
    # Write member by member: np.savez refuses an array with the name "file".
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_npy(member, array)  # type: ignore[arg-type]


def can_keep(dtype: np.dtype) -> bool:
    """Return whether NumPy's formats have a name for the dtype, or it is bfloat16."""
    if dtype == ml_dtypes.bfloat16:
        return True
    if dtype.type.__module__ == "ml_dtypes":
        return False
    try:
        return (
            np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype)) == dtype
        )
    except (TypeError, ValueError):
        return False
