"""Arrays that lie in files and are read on use: one interface for every format."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from jlora.checkpoints.safetensors import find_dtype
from jlora.checkpoints.safetensors_header import TensorEntry

_ALIGNMENT = 64  # bytes


@runtime_checkable
class StoredArray(Protocol):
    """An array of a checkpoint, known by its header and read on use."""

    @property
    def file(self) -> pathlib.Path:
        """The file, or the folder of a format that has no single file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, without reading the data."""
        ...

    @property
    def dtype(self) -> str:
        """NumPy's name of the dtype, or the format's own if NumPy has none."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the array in memory."""
        ...

    @property
    def entry(self) -> TensorEntry | None:
        """Its place in a safetensors file; None for the other formats."""
        ...

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Return rows first to last, 0 <= first <= last; a scalar is read whole."""
        ...


class FileState(NamedTuple):
    """A file at the time when its header was read."""

    path: pathlib.Path
    num_bytes: int
    mtime_ns: int


def find_state(path: pathlib.Path) -> FileState:
    """Return the state of a file now.

    Raises:
        OSError: it does not exist.
    """
    status = os.stat(path)
    return FileState(path, status.st_size, status.st_mtime_ns)


def check_unchanged(state: FileState) -> None:
    """Refuse a file that has changed since its header was read."""
    if find_state(state.path) != state:
        raise ValueError(
            f"{state.path}: must not change while it is open, got another file. Open "
            "the checkpoint again."
        )


@contextlib.contextmanager
def open_unchanged(state: FileState) -> Iterator[io.FileIO]:
    """Yield the file, open without a buffer, after a check that it has not changed."""
    with open(state.path, "rb", buffering=0) as file:
        check_unchanged(state)
        yield file


class SafetensorsArray(NamedTuple):
    """A tensor of a safetensors file: a range of its bytes."""

    state: FileState
    name: str
    entry: TensorEntry

    @property
    def file(self) -> pathlib.Path:
        return self.state.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        known = find_dtype(self.entry.dtype)
        return self.entry.dtype if known is None else known.name

    @property
    def num_bytes(self) -> int:
        return self.entry.num_bytes

    def join_rows(self) -> SafetensorsArray:
        """Return a stack [k, m, n] as one matrix [k * m, n]."""
        k, m, n = self.shape
        return self._replace(entry=self.entry._replace(shape=(k * m, n)))

    def check_dtype(self) -> np.dtype:
        """Return the dtype, or refuse one that NumPy does not know."""
        dtype = find_dtype(self.entry.dtype)
        if dtype is None:
            raise ValueError(
                f"{self.file}: must hold dtypes that NumPy knows, got "
                f"{self.entry.dtype} at {self.name}. Convert it first."
            )
        return dtype

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the tensor, read into memory of their own."""
        dtype = self.check_dtype()
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        row_bytes = self.num_bytes // max(self.shape[0], 1) if self.shape else 0
        rows = make_aligned(shape, dtype)

        with open_unchanged(self.state) as file:
            file.seek(self.entry.start + first * row_bytes)
            if not fill(rows, file):
                raise ValueError(
                    f"{self.file}: ended within {self.name}. Download it again."
                )
        return rows


def make_aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return an array whose memory XLA can use on a CPU without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


@runtime_checkable
class Readable(Protocol):
    """Bytes that can be read into memory that exists."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def fill(array: np.ndarray, stream: Readable) -> bool:
    """Read the bytes of a contiguous array, and return whether they were all there."""
    view, position = memoryview(array.reshape(-1).view(np.uint8).data), 0
    while position < len(view):
        count = stream.readinto(view[position:])
        if not count:
            return False
        position += count
    return True
