"""`open_checkpoint`: the arrays of a checkpoint, read when they are used."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jlora._types import Float
from jlora.checkpoints.float_weights import (
    Scale,
    find_scales,
    is_floating,
    is_fp8,
    make_scale,
    read_block_size,
    scale_rows,
)
from jlora.checkpoints.folders import read_model_config
from jlora.checkpoints.lazy_tensors import LazyTensor
from jlora.checkpoints.safetensors_header import TensorEntry
from jlora.checkpoints.slices import find_bounds, read_block
from jlora.checkpoints.sources import list_arrays
from jlora.checkpoints.stored_arrays import SafetensorsArray, StoredArray


class TensorInfo(NamedTuple):
    """Shape, dtype, size and file of an array, known without reading it.

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
        """Return one array, read from its file now and owned by the caller.

        These are the stored values: a weight in fp8 means little without its scale, see
        `read_dequantized`.
        """
        return self.read_rows(name, 0, None)

    def __contains__(self, name: object) -> bool:
        # A mapping's own answer would read the array.
        return name in self._arrays

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
        """The files that hold the arrays, in the order of the names.

        For Orbax this is the folder of the tree.
        """
        return tuple(dict.fromkeys(array.file for array in self._arrays.values()))

    @functools.cached_property
    def scales(self) -> dict[str, str]:
        """{weight in fp8: the tensor with its scale}, for each that has one."""
        found = {
            name: find_scales(name, self._arrays)
            for name, array in self._arrays.items()
            if is_fp8(array.dtype)
        }
        return {name: scales[0] for name, scales in found.items() if scales}

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype, bytes and file of an array without reading it."""
        array = self._find(name)
        return TensorInfo(array.shape, array.dtype, array.num_bytes, array.file)

    def locate(self, name: str) -> TensorEntry:
        """Return the place of an array in its file, with the format's own dtype.

        Raises:
            KeyError: no array of this name.
            ValueError: it is in no .safetensors file.
        """
        array = self._find(name)
        if array.entry is None:
            raise ValueError(
                f"{array.file}: must be a .safetensors file for a copy of its bytes, "
                f"got another at {name}. Write the arrays as .safetensors with "
                "save_arrays first."
            )
        return array.entry

    def read_rows(
        self, name: str, start: int, stop: int | None, *, index: int | None = None
    ) -> np.ndarray:
        """Return rows start to stop of an array: entries along its first axis.

        With an index they are rows of that entry of a stack [k, m, n].

        Only these rows are read from .safetensors files, .npy files and members of .npz
        files that are not compressed. Compressed members are decompressed up to the
        last row, and leaves of Orbax are restored whole.

        Raises:
            KeyError: no array of this name.
            OSError, ValueError: the file has changed since it was opened, is damaged,
                or holds a dtype that NumPy does not know.
        """
        array = self._find(name)
        if not array.shape:
            return array.read_rows(0, 1)
        if index is not None:
            first, last, _ = slice(start, stop).indices(array.shape[1])
            if not isinstance(array, SafetensorsArray):
                return array.read_rows(index, index + 1)[0, first:last]
            offset = index * array.shape[1]
            return array.join_rows().read_rows(offset + first, offset + last)
        first, last, _ = slice(start, stop).indices(array.shape[0])
        return array.read_rows(first, max(first, last))

    def read_slice(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """Return `self[name][index]`, with a slice for each axis; missing ones are all.

        Only the block is read from .safetensors files, and its rows from others.
        """
        array = self._find(name)
        return read_block(array, find_bounds(index, array.shape, name))

    def read_dequantized(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: DTypeLike = np.float32,
    ) -> Float[np.ndarray, ...]:
        """Return a weight in floating point, an fp8 one multiplied by its scale.

        The scale is the tensor `<name>_scale_inv` (a number for each block) or
        `<name>_scale` (one number, or one for each row). The size of the blocks is
        `quantization_config.weight_block_size` of config.json; without it, the shapes
        must leave no choice. A weight of 16 to 64 bits is only cast.

        Args:
            name: of the weight.
            start: first row.
            stop: row after the last one. None: all.
            dtype: of the result and of the product, float32 or float64.

        Raises:
            KeyError: no array of this name.
            OSError, ValueError: as `read_rows`; an fp8 weight without a scale, a scale
                of another shape, an array that is no floating point.
            TypeError: `dtype` is neither float32 nor float64.

        Example:
            >>> import ml_dtypes, numpy as np, tempfile, jlora
            >>> folder = tempfile.TemporaryDirectory()
            >>> w = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
            >>> arrays = {"w": w, "w_scale": np.array([[0.5], [2.0]], np.float32)}
            >>> jlora.save_arrays(f"{folder.name}/w.safetensors", arrays)
            >>> checkpoint = jlora.checkpoints.open_checkpoint(folder.name)
            >>> checkpoint.read_dequantized("w").tolist()
            [[0.5, 0.5], [2.0, 2.0]]
            >>> folder.cleanup()
        """
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(
                f"`dtype` must be float32 or float64, got {np.dtype(dtype)}. Cast the "
                "result."
            )
        array = self._find(name)
        if is_fp8(array.dtype):
            scale = self.read_scale(name)  # refused before the weight is read
            rows = self.read_rows(name, start, stop).astype(dtype)
            first = slice(start, stop).indices(array.shape[0])[0] if array.shape else 0
            scale_rows(rows, scale, first)
            return rows
        if not is_floating(array.dtype):
            raise ValueError(
                f"{array.file}: {name} must be floating of 8 to 64 bits, got "
                f"{array.dtype}. Read it with `checkpoint[name]`."
            )
        return self.read_rows(name, start, stop).astype(dtype, copy=False)

    def read_scale(self, name: str) -> Scale:
        """Return the scale of an fp8 weight, which must have exactly one."""
        found, array = find_scales(name, self._arrays), self._arrays[name]
        if len(found) != 1:
            raise ValueError(
                f"{array.file}: {name} is in fp8 and must have one scale, "
                f"{name}_scale_inv or {name}_scale, got {len(found)} of them. Download "
                "the whole model, or choose one in bfloat16."
            )
        try:
            return make_scale(self[found[0]], found[0], array.shape, self._block_size)
        except ValueError as error:
            raise ValueError(f"{self._arrays[found[0]].file}: {error}") from None

    @functools.cached_property
    def _block_size(self) -> tuple[int, int] | None:
        return read_block_size(read_model_config(self.path), self.path)

    def list_lazy_arrays(self) -> dict[str, LazyTensor]:
        """Return the checkpoint as a tree whose leaves are read when they are used."""
        return {name: LazyTensor(self, name) for name in self}

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
            array of a .npy file has the name of the file without its suffix. Or a
            folder of Orbax: a tree, or a step with the item "default" or "params" or
            with one item. Its leaves have the names of their paths, joined with ".".

    Returns:
        `Checkpoint`, a mapping {name: NumPy array} with `info`, `read_rows`,
        `read_slice`, `read_dequantized`, `scales`, `files` and `num_bytes`. The names
        are in the order of the files and of their data. `load_sharded` puts it on
        devices.

    Raises:
        ImportError: an Orbax checkpoint, without orbax-checkpoint (`jlora[train]`).
        OSError: a file cannot be opened.
        ValueError: a damaged file, an index that names a missing file, a file outside
            of the folder or an array that is not there; pickled weights (.bin, .pt),
            arrays of Python objects, an Orbax checkpoint that is not finished.

    Cost: the headers are read. 10,000 arrays take about 0.1 s in a .safetensors
        file and 0.5 s in a .npz file. A member of a .npz file that is compressed is
        decompressed each time it is read. Orbax needs 1 s to open 2,000 leaves, and
        0.05 s beside the data for each leaf of them. It reads leaves whole, and with
        one of a list the whole list.

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
