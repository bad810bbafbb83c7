"""NumPy's formats, .npy and .npz, read without trust in a single byte.

Headers are checked against the bytes that are there before memory is taken for them.
Nothing is unpickled.
"""

from __future__ import annotations

import ast
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000  # NumPy's own limit; ast.literal_eval needs one
# Deflate cannot expand a byte to more than this.
_MAX_EXPANSION = 1032


class _Header(NamedTuple):
    """What a .npy file says of its array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool


def read_npy(file: BinaryIO, num_bytes: int) -> np.ndarray:
    """Return the array of an open .npy file that has `num_bytes` bytes.

    Two-byte void items are read as bfloat16, and foreign byte orders are swapped.

    Raises:
        ValueError: the file is damaged, truncated, or holds Python objects.
    """
    header, header_bytes = _read_header(file)
    needed = math.prod(header.shape) * header.dtype.itemsize
    found = num_bytes - header_bytes
    if needed != found:
        raise ValueError(f"the array needs {needed} bytes, and {found} follow")

    data = np.empty(needed, np.uint8)
    view, position = memoryview(data.data), 0
    while position < needed:
        count = file.readinto(view[position:])  # type: ignore[attr-defined]
        if not count:
            raise ValueError(f"the array needs {needed} bytes, got {position}")
        position += count

    array = data.view(header.dtype)
    if header.is_fortran:
        array = array.reshape(header.shape[::-1]).T
    else:
        array = array.reshape(header.shape)
    return _to_native(array)


def _read_header(file: BinaryIO) -> tuple[_Header, int]:
    """Return the header of a .npy file, and the number of its bytes."""
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
    return _parse_header(text), len(start) + len(field) + length


def _parse_header(text: bytes) -> _Header:
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
    return _Header(dtype, shape, entries["fortran_order"])


def _to_native(array: np.ndarray) -> np.ndarray:
    """Return the array in the byte order of the machine; void pairs as bfloat16."""
    if array.dtype == np.dtype("V2"):
        return array.view(ml_dtypes.bfloat16)
    if array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))


def read_npz(file: BinaryIO, num_bytes: int) -> dict[str, np.ndarray]:
    """Return {name: array} of an open .npz file that has `num_bytes` bytes.

    Each member is opened by its own entry: NumPy's reader takes the member "a.npy" for
    an array with the name "a.npy", whose member is "a.npy.npy".

    Raises:
        ValueError, zipfile.BadZipFile: the file is damaged, or holds anything else.
    """
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > num_bytes:
            raise ValueError("its members are larger than the file")
        for member in members:
            name = _check_member(member)
            if name in arrays:
                raise ValueError(f"it holds {name!r} twice")
            with archive.open(member) as stream:
                arrays[name] = read_npy(stream, member.file_size)  # type: ignore[arg-type]
                stream.read(1)  # at the end of the member its checksum is compared
    return arrays


def _check_member(member: zipfile.ZipInfo) -> str:
    """Return the name of the array in a member of an archive."""
    if not member.filename.endswith(".npy"):
        raise ValueError(f"its member {member.filename!r} is no .npy file")
    if member.flag_bits & 1:
        raise ValueError(f"its member {member.filename!r} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"its member {member.filename!r} is compressed by a method that .npz files "
            "do not use"
        )
    if member.file_size > _MAX_EXPANSION * member.compress_size:
        raise ValueError(
            f"its member {member.filename!r} claims {member.file_size} bytes in "
            f"{member.compress_size}"
        )
    return member.filename.removesuffix(".npy")


def write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array to an open binary file in the .npy format."""
    np.lib.format.write_array(file, array, allow_pickle=False)


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} to an open binary file in the .npz format."""
    # Write member by member: np.savez refuses an array with the name "file".
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
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


def find_size(file: BinaryIO) -> int:
    """Return the number of bytes of an open file."""
    return os.fstat(file.fileno()).st_size
