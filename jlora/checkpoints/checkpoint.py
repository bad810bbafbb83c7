"""`open_checkpoint`: the arrays of a checkpoint, read when they are used."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jlora.checkpoints.safetensors_header import TensorEntry
from jlora.checkpoints.sources import list_arrays
from jlora.checkpoints.stored_arrays import StoredArray


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

    def __init__(self, path: pathlib.Path, arrays: Mapping[str, StoredArray]) -> None:
        self.path = path
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one array, read from its file now and owned by the caller."""
        return self.read_rows(name, 0, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, {len(self)} arrays, "
            f"{self.num_bytes} bytes)"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.num_bytes for array in self._arrays.values())

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files that hold the arrays, in the order of the names."""
        return tuple(dict.fromkeys(array.file for array in self._arrays.values()))

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, bytes and file of an array without reading it."""
        array = self._find(name)
        return TensorInfo(array.shape, array.dtype, array.num_bytes, array.file)

    def locate(self, name: str) -> TensorEntry:
        """Return the place of an array in its file, with the format's own dtype.

        Raises:
            KeyError: no array of this name.
            ValueError: the file is no .safetensors file.
        """
        array = self._find(name)
        if array.entry is None:
            raise ValueError(
                f"{array.file}: must be a .safetensors file for a copy of its bytes, "
                f"got another at {name}. Write the arrays as .safetensors with "
                "save_arrays first."
            )
        return array.entry

    def read_rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        """Return rows start to stop of an array: entries along its first axis.

        Only these rows are read from .safetensors files, .npy files and members of .npz
        files that are not compressed. Compressed members are decompressed up to the
        last row.

        Raises:
            KeyError: no array of this name.
            OSError, ValueError: the file has changed since it was opened, is damaged,
                or holds a dtype that NumPy does not know.
        """
        array = self._find(name)
        if not array.shape:
            return array.read_rows(0, 1)
        first, last, _ = slice(start, stop).indices(array.shape[0])
        return array.read_rows(first, max(first, last))

    def _find(self, name: str) -> StoredArray:
        try:
            return self._arrays[name]
        except KeyError:
            raise KeyError(f"{self.path}: has no array {name!r}") from None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Return the arrays of a checkpoint as a read-only mapping that reads on use.

    Names, shapes and dtypes are known at once; an array, or some of its rows, is read
    each time it is asked for, into memory of its own, and not kept. Nothing is
    unpickled, and no file outside of the folder is read.

    Args:
        path: a .safetensors, .npy or .npz file; a folder with `model.safetensors`,
            with one index (`model.safetensors.index.json`) and the files that it names,
            or with one .safetensors file; a model folder of Hugging Face is one. The
            array of a .npy file has the name of the file without its suffix.

    Returns:
        `Checkpoint`, a mapping {name: NumPy array} with `info`, `read_rows`, `files`
        and `num_bytes`. The names are in the order of the files and of their data.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a damaged file, an index that names a missing file, a file outside
            of the folder or an array that is not there; pickled weights (.bin, .pt),
            arrays of Python objects.

    Cost: the headers are read. 10,000 arrays take about 0.1 s. A member of a .npz file
        that is compressed is decompressed each time it is read.

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
    return Checkpoint(path, list_arrays(path))
