"""Arrays of .npy and .npz files, read on use: an array, or some of its rows."""

from __future__ import annotations

import contextlib
import math
import pathlib
import stat
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from jlora.checkpoints.members import Member, MemberStream
from jlora.checkpoints.numpy_files import (
    ArrayHeader,
    find_native,
    read_header,
    to_native,
)
from jlora.checkpoints.stored_arrays import (
    FileState,
    check_unchanged,
    fill,
    find_state,
    open_unchanged,
)

SUFFIXES = (".npy", ".npz")

# Deflate cannot expand a byte to more than this.
_MAX_EXPANSION = 1032


class NumpyArray(NamedTuple):
    """The array of a .npy file, or of a member of a .npz file."""

    state: FileState
    member: Member
    header: ArrayHeader
    header_bytes: int
    entry: None = None

    @property
    def file(self) -> pathlib.Path:
        return self.state.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> str:
        return find_native(self.header.dtype).name

    @property
    def num_bytes(self) -> int:
        return self.header.num_bytes

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the array; the checksum is compared if it is read whole."""
        with open_unchanged(self.state) as file, _naming(self.file):
            stream = MemberStream(file, self.member)
            stream.read_past(self.header_bytes)
            if self.header.is_fortran:
                rows = _read_fortran(stream, self.header, first, last)
            else:
                rows = _read_c(stream, self.header, first, last)
            if rows.shape == self.shape:
                stream.check_end()
            return to_native(rows)


def list_numpy_arrays(path: pathlib.Path) -> dict[str, NumpyArray]:
    """Return {name: array} of a .npy or .npz file, whose headers are read.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, truncated, or holds anything but plain arrays.
    """
    state = find_state(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: must be a regular file, got none. Choose a file.")
    if state.num_bytes == 0:
        raise ValueError(
            f"{path}: must hold arrays, got an empty file. Write it again."
        )

    with open(path, "rb") as file, _naming(path):
        check_unchanged(state)
        if path.suffix == ".npz":
            return _list_members(file, state)
        header, header_bytes = read_header(file, state.num_bytes)
        whole = Member(0, state.num_bytes, state.num_bytes, False, None)
        return {path.stem: NumpyArray(state, whole, header, header_bytes)}


def _list_members(file: BinaryIO, state: FileState) -> dict[str, NumpyArray]:
    """Return the arrays of an open archive.

    Each member is opened by its own entry: NumPy's reader takes the member "a.npy" for
    an array with the name "a.npy", whose member is "a.npy.npy".
    """
    arrays: dict[str, NumpyArray] = {}
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.compress_size for member in members) > state.num_bytes:
            raise ValueError("its members are larger than the file")
        for info in members:
            name = _check_member(info)
            if name in arrays:
                raise ValueError(f"it holds {name!r} twice")
            with archive.open(info) as stream:  # compares the two entries of a member
                header, header_bytes = read_header(stream, info.file_size)  # type: ignore[arg-type]
            member = _find_member(file, info, state.num_bytes)
            arrays[name] = NumpyArray(state, member, header, header_bytes)
    return arrays


def _check_member(info: zipfile.ZipInfo) -> str:
    """Return the name of the array in a member of an archive."""
    name = info.filename
    if not name.endswith(".npy"):
        raise ValueError(f"its member {name!r} is no .npy file")
    if info.flag_bits & 1:
        raise ValueError(f"its member {name!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"its member {name!r} is compressed by a method that .npz files do not use"
        )

    is_packed = info.compress_type == zipfile.ZIP_DEFLATED
    limit = info.compress_size * (_MAX_EXPANSION if is_packed else 1)
    if info.file_size > limit:
        raise ValueError(
            f"its member {name!r} claims {info.file_size} bytes in {info.compress_size}"
        )
    return name.removesuffix(".npy")


def _find_member(file: BinaryIO, info: zipfile.ZipInfo, num_bytes: int) -> Member:
    """Return where the data of a member lies, behind the entry in front of it."""
    file.seek(info.header_offset + 26)
    lengths = struct.unpack("<HH", file.read(4))  # of the name and the extra field
    start = info.header_offset + 30 + sum(lengths)
    if start + info.compress_size > num_bytes:
        raise ValueError(f"its member {info.filename!r} ends after the file")
    is_packed = info.compress_type == zipfile.ZIP_DEFLATED
    return Member(start, info.compress_size, info.file_size, is_packed, info.CRC)


def _read_c(
    stream: MemberStream, header: ArrayHeader, first: int, last: int
) -> np.ndarray:
    """Return rows of an array whose rows lie one after another."""
    inner = header.shape[1:]
    rows = np.empty((last - first, *inner) if header.shape else (), header.dtype)
    stream.skip(first * math.prod(inner) * header.dtype.itemsize)
    _fill_whole(rows, stream)
    return rows


def _read_fortran(
    stream: MemberStream, header: ArrayHeader, first: int, last: int
) -> np.ndarray:
    """Return rows of an array whose first axis is the fastest."""
    num_rows, *inner = header.shape or (1,)
    if last - first == num_rows:
        whole = np.empty(header.shape[::-1], header.dtype)
        _fill_whole(whole, stream)
        return whole.T

    columns = np.empty((math.prod(inner), last - first), header.dtype)
    before, after = first, num_rows - last
    for column in columns:
        stream.skip(before * header.dtype.itemsize)
        _fill_whole(column, stream)
        stream.skip(after * header.dtype.itemsize)
    return columns.reshape(*inner[::-1], last - first).T


def _fill_whole(array: np.ndarray, stream: MemberStream) -> None:
    if not fill(array, stream):
        raise ValueError("it ends within an array")


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Make every error of damaged bytes a ValueError that names the file.

    The parsers of zipfile, zlib and ast raise two dozen kinds of them.
    """
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{path}: "):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: must be a whole {path.suffix} file of plain arrays, got one that "
            f"cannot be read ({reason}). Write it again."
        ) from None
