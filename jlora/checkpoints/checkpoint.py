"""`open_checkpoint`: the arrays of a checkpoint, read when they are used."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.folders import find_files
from jlora.checkpoints.lazy_tensors import LazyTensor
from jlora.checkpoints.safetensors import find_dtype
from jlora.checkpoints.safetensors_header import TensorEntry, read_header


class TensorInfo(NamedTuple):
    """What is known of an array without reading it.

    Example:
        >>> import jlora
        >>> jlora.checkpoints.TensorInfo._fields
        ('shape', 'dtype', 'num_bytes', 'file')
    """

    shape: tuple[int, ...]
    dtype: str  # NumPy's name, such as "bfloat16"
    num_bytes: int
    file: pathlib.Path


class Checkpoint(Mapping[str, np.ndarray]):
    """A read-only mapping from names to NumPy arrays; see `open_checkpoint`.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> jlora.save_arrays(f"{folder.name}/w.safetensors", {"w": np.eye(3)})
        >>> with_arrays = jlora.checkpoints.open_checkpoint(folder.name)
        >>> list(with_arrays), with_arrays.num_bytes
        (['w'], 72)
        >>> folder.cleanup()
    """

    def __init__(self, path: pathlib.Path, tensors: dict[str, Any]) -> None:
        self.path = path
        self._tensors = tensors  # {name: (file, its state, TensorEntry)}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one array, read from its file now and owned by the caller."""
        return self.read_rows(name, 0, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {len(self)} arrays, "
            f"{self.num_bytes} bytes)"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(entry.num_bytes for _, _, entry in self._tensors.values())

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files that hold the arrays, in the order of the names."""
        return tuple(dict.fromkeys(file for file, _, _ in self._tensors.values()))

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, bytes and file of an array without reading it."""
        file, _, entry = self._find(name)
        dtype = find_dtype(entry.dtype)
        known = entry.dtype if dtype is None else dtype.name
        return TensorInfo(entry.shape, known, entry.num_bytes, file)

    def locate(self, name: str) -> TensorEntry:
        """Return the place of an array in its file, with the format's own dtype."""
        return self._find(name)[2]

    def read_rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Return rows start to stop of an array: entries along its first axis.

        Raises:
            KeyError: no array of this name.
            OSError, ValueError: the file has changed since it was opened, or holds a
                dtype that NumPy does not know.
        """
        file, state, entry = self._find(name)
        dtype = find_dtype(entry.dtype)
        if dtype is None:
            raise ValueError(
                f"{file}: must hold dtypes that NumPy knows, got {entry.dtype} at "
                f"{name}. Convert it first."
            )
        if not entry.shape:
            flat = _read(file, state, name, entry.start, entry.num_bytes, dtype)
            return flat.reshape(())

        first, last, _ = slice(start, stop).indices(entry.shape[0])
        shape = (max(last - first, 0), *entry.shape[1:])
        row_bytes = entry.num_bytes // max(entry.shape[0], 1)
        flat = _read(
            file,
            state,
            name,
            entry.start + first * row_bytes,
            shape[0] * row_bytes,
            dtype,
        )
        return flat.reshape(shape)

    def list_lazy_arrays(self) -> dict[str, LazyTensor]:
        """Return the checkpoint as a tree whose leaves are read when they are used."""
        return {name: LazyTensor(self, name) for name in self}

    def _find(self, name: str) -> tuple[pathlib.Path, tuple, TensorEntry]:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path}: has no array {name!r}") from None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the arrays of a checkpoint as a read-only mapping that reads on use.

    Names, shapes and dtypes are known at once; an array, or some of its rows, is read
    each time it is asked for, into memory of its own, and not kept. Nothing is
    unpickled, and no file outside of the folder is read.

    Args:
        path: a .safetensors file; a folder with `model.safetensors`, with one index
            (`model.safetensors.index.json`) and the files that it names, or with one
            .safetensors file; a model folder of Hugging Face is one. For .npy and .npz
            files use `load_arrays`.

    Returns:
        `Checkpoint`, a mapping {name: NumPy array} with `info`, `read_rows`, `files`
        and `num_bytes`. The names are in the order of the files and of their data.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a damaged file, an index that names a missing file, a file outside
            of the folder or an array that is not there; pickled weights (.bin, .pt).

    Cost: the headers are read. 10,000 arrays take about 0.1 s.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> jlora.save_arrays(f"{folder.name}/w.safetensors", {"w": np.eye(3)})
        >>> checkpoint = jlora.checkpoints.open_checkpoint(folder.name)
        >>> checkpoint.info("w").shape, checkpoint.read_rows("w", 1, 2).tolist()
        ((3, 3), [[0.0, 1.0, 0.0]])
        >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    tensors: dict[str, Any] = {}
    for file, names in find_files(path).items():
        entries, state = read_header(file).entries, _find_state(file)
        absent = [name for name in names or () if name not in entries]
        if absent:
            raise ValueError(
                f"{file}: must hold the arrays that the index names, got none called "
                f"{absent[0]!r}. Download the file again."
            )
        for name, entry in entries.items():
            if names is not None and name not in names:
                continue  # of an earlier save, or another file holds it
            tensors[name] = (file, state, entry)
    return Checkpoint(path, tensors)


def _find_state(file: pathlib.Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _read(
    file: pathlib.Path,
    state: tuple[int, int],
    name: str,
    start: int,
    num_bytes: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Return the items of a byte range, read into memory of their own."""
    items = np.empty(num_bytes // dtype.itemsize, dtype)
    view, position = memoryview(items.view(np.uint8).data), 0
    with open(file, "rb", buffering=0) as stream:
        if _find_state(file) != state:
            raise ValueError(
                f"{file}: must not change while it is open, got another file. Open the "
                "checkpoint again."
            )
        stream.seek(start)
        while position < num_bytes:
            count = stream.readinto(view[position:])
            if not count:
                raise ValueError(f"{file}: ended within {name}. Download it again.")
            position += count
    return items
