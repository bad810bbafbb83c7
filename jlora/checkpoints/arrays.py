"""Named arrays in .npy, .npz and .safetensors files."""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, TypeAlias

import ml_dtypes
import numpy as np

from jlora._types import AnyArray
from jlora.checkpoints.files import replace_file
from jlora.checkpoints.safetensors import read_safetensors, write_safetensors

SUFFIXES = (".npy", ".npz", ".safetensors")
_UNREADABLE = (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile)

Path: TypeAlias = str | os.PathLike[str]


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npy, .npz or .safetensors file by name.

    The array of a .npy file has the name of the file without its suffix. NumPy's
    formats have no name for bfloat16 and store it as two-byte void items; such items
    are read as bfloat16. Pickled objects are refused.

    Args:
        path: the file. The suffix decides the format.

    Returns:
        {name: NumPy array} in the order of the file, with the stored dtypes.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another suffix, or a file that is empty, truncated or of another
            format.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> jlora.save_arrays(f"{folder.name}/w.npy", {"w": np.eye(2)})
        >>> jlora.load_arrays(f"{folder.name}/w.npy")["w"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    suffix = check_suffix(path)
    if os.stat(path).st_size == 0:
        raise ValueError(
            f"{path}: must hold arrays, got an empty file. Write it again."
        )
    if suffix == ".safetensors":
        return read_safetensors(path)

    try:
        return {path.stem: _read_npy(path)} if suffix == ".npy" else _read_npz(path)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: must be a whole {suffix} file of plain arrays, got one that "
            f"cannot be read ({error}). Write it again."
        ) from None


def _read_npy(path: pathlib.Path) -> np.ndarray:
    """Return the array of a .npy file."""
    with open(path, "rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("bytes follow the array")
    return _restore_bfloat16(array)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name."""
    # Open the file here: np.load leaves it open if it finds no archive inside.
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        return {name: _restore_bfloat16(archive[name]) for name in archive.files}


def _restore_bfloat16(array: np.ndarray) -> np.ndarray:
    """Return two-byte void items as bfloat16, and other arrays unchanged."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def save_arrays(path: Path, arrays: Mapping[str, AnyArray] | AnyArray) -> None:
    """Write named arrays to a .npy, .npz or .safetensors file.

    The content goes to a temporary file in the same folder, which is flushed and then
    renamed. If the write fails, an existing file keeps its content.

    Args:
        path: the file. The suffix decides the format.
        arrays: {name: array}, or one array for .npy.

    Raises:
        OSError: the file cannot be written.
        TypeError: a dtype that the format has no name for.
        ValueError: another suffix, no array, or several arrays for .npy.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> arrays = {"a": np.ones(2), "b": np.zeros(3)}
        >>> jlora.save_arrays(f"{folder.name}/w.npz", arrays)
        >>> sorted(jlora.load_arrays(f"{folder.name}/w.npz"))
        ['a', 'b']
        >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    suffix = check_suffix(path)
    named: Any = arrays if hasattr(arrays, "items") else {path.stem: arrays}
    named = {name: _to_numpy(name, array) for name, array in named.items()}
    check_count(path, len(named))

    with replace_file(path) as file:
        if suffix == ".safetensors":
            write_safetensors(file, named)
        elif suffix == ".npz":
            _write_npz(file, named)
        else:
            (array,) = named.values()
            np.lib.format.write_array(file, array, allow_pickle=False)


def _to_numpy(name: str, array: AnyArray) -> np.ndarray:
    """Return the array as NumPy, or refuse anything but an array of numbers."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(
            f"`arrays` must hold NumPy or JAX arrays, got {type(array).__name__} at "
            f"{name}. Wrap it with np.asarray."
        )
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise TypeError(
            f"`arrays` must hold numbers, got Python objects at {name}. Convert them."
        )
    return array


def _write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} to an open binary file in the .npz format."""
    # Write member by member: np.savez refuses an array with the name "file".
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def check_suffix(path: Path) -> str:
    """Return the suffix of a path after a check that it names a format."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: must end in {', '.join(SUFFIXES)}, "
            f"got {suffix or 'no suffix'!r}. Rename it."
        )
    return suffix


def check_count(path: Path, count: int) -> None:
    """Refuse a number of arrays that the format of `path` cannot hold."""
    if count == 0:
        raise ValueError(
            f"{path}: `arrays` must hold at least one array, got none. Name one."
        )
    if count > 1 and pathlib.Path(path).suffix == ".npy":
        raise ValueError(
            f"{path}: a .npy file must hold exactly one array, got {count}. "
            "Write an .npz or .safetensors file."
        )
