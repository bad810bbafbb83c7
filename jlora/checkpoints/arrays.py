"""Named arrays in .npy, .npz and .safetensors files."""

import os
import pathlib
import zipfile

import ml_dtypes
import numpy as np

from jlora.checkpoints.files import replace_file
from jlora.checkpoints.safetensors import read_safetensors, write_safetensors

SUFFIXES = (".npy", ".npz", ".safetensors")


def load_arrays(path):
    """Return {name: NumPy array} of a .npy, .npz or .safetensors file.

    A .npy file has one array, named after the file without its suffix. NumPy's formats have no
    name for bfloat16: two-byte void items, which is how such arrays are written, are read as it.
    Nothing is unpickled.

    Args:
        path: the file; the suffix decides the format.

    Returns:
        dict in the file's order, dtypes as stored.

    Raises:
        OSError: the file cannot be opened.
        ValueError: another suffix, or a file that is empty, truncated or of another format.

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
        if suffix == ".npy":
            return {path.stem: _restore_bfloat16(_read_npy(path))}
        # Opened here: NumPy leaves the file open when it turns out to be no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: _restore_bfloat16(archive[name]) for name in archive.files}
    except (
        ValueError,
        EOFError,
        KeyError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{path}: must be a whole {suffix} file of plain arrays, got one that cannot be read "
            f"({error}). Write it again."
        ) from None


def save_arrays(path, arrays):
    """Write named arrays to a .npy, .npz or .safetensors file.

    Written to a temporary file in the same folder, flushed, then renamed: a failure leaves
    what was there before.

    Args:
        path: the file; the suffix decides the format.
        arrays: mapping of names to arrays, or for .npy a single array.

    Raises:
        OSError: the file cannot be written.
        TypeError: a dtype that the format has no name for.
        ValueError: another suffix, no array, or several arrays for .npy.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> jlora.save_arrays(f"{folder.name}/w.npz", {"a": np.ones(2), "b": np.zeros(3)})
        >>> sorted(jlora.load_arrays(f"{folder.name}/w.npz"))
        ['a', 'b']
        >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    suffix = check_suffix(path)
    if not hasattr(arrays, "items"):
        arrays = {path.stem: arrays}
    arrays = {name: _to_numpy(name, array) for name, array in arrays.items()}
    check_count(path, len(arrays))
    with replace_file(path) as file:
        if suffix == ".safetensors":
            write_safetensors(file, arrays)
        elif suffix == ".npz":
            _write_npz(file, arrays)
        else:
            np.lib.format.write_array(file, *arrays.values(), allow_pickle=False)


def check_suffix(path):
    """Return the suffix of a path if it names a format."""
    suffix = pathlib.Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: must end in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}. Rename it."
        )
    return suffix


def check_count(path, count):
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


def _read_npy(path):
    with open(path, "rb") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("bytes follow the array")
    return array


def _write_npz(file, arrays):
    # Written member by member: np.savez cannot take an array whose name is "file".
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _to_numpy(name, array):
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(
            f"`arrays` must hold NumPy or JAX arrays, got {type(array).__name__} at {name}. "
            "Wrap it with np.asarray."
        )
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise TypeError(
            f"`arrays` must hold numbers, got Python objects at {name}. Convert them."
        )
    return array


def _restore_bfloat16(array):
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
