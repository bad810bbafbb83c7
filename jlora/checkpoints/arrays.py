"""Named arrays in .npy, .npz and .safetensors files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import AnyArray
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.files import replace_file
from jlora.checkpoints.host_arrays import write_together
from jlora.checkpoints.numpy_files import can_keep, write_npy, write_npz
from jlora.checkpoints.quantized_files import (
    STATE,
    find_parts,
    join_tensors,
    list_tensors,
)
from jlora.checkpoints.safetensors import (
    check_entries,
    sort_names,
    write_safetensors,
)
from jlora.quantization.quantized_array import QuantizedArray

SUFFIXES = (".npy", ".npz", ".safetensors")

Path: TypeAlias = str | os.PathLike[str]


def load_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a .npy, .npz or .safetensors file by name.

    An array that was saved as a `QuantizedArray` is one again; quantised weights of
    other programs stay the tensors that they are, see `load_weights`.

    The array of a .npy file has the name of the file without its suffix. NumPy's
    formats have no name for bfloat16 and store it as two-byte void items; such items
    are read as bfloat16. Foreign byte orders are swapped. Nothing is unpickled, and no
    more memory is taken than the bytes of the file stand for.

    Args:
        path: the file. The suffix decides the format.

    Returns:
        {name: NumPy array} in the order of the file, with the stored dtypes in the
        byte order of the machine.

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
    check_suffix(path)
    if os.path.isdir(path):
        raise ValueError(f"{path}: must be a regular file, got none. Choose a file.")
    arrays: dict[str, Any] = dict(open_checkpoint(path))
    for name in [name for name in arrays if f"{name}{STATE}" in arrays]:
        parts = find_parts(name, arrays)
        arrays[name] = join_tensors(name, arrays, path)
        for part in parts:
            del arrays[part]
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, AnyArray] | AnyArray) -> None:
    """Write named arrays to a .npy, .npz or .safetensors file.

    The content goes to a temporary file in the same folder, which is flushed and then
    renamed. If the write fails, an existing file keeps its content.

    Arrays may be sharded over devices and over the processes of `jax.distributed`. If
    one of them lies on devices of several processes, all processes have to call this
    with the same arrays: they gather one array at a time, the first process writes it,
    and all return when the file is there. Otherwise the process that calls it writes.

    Args:
        path: the file. The suffix decides the format.
        arrays: {name: array}, or one array for .npy. A `QuantizedArray` becomes several
            tensors, `<name>`, `<name>.scales`, `<name>.quantized`, ...

    Raises:
        OSError: the file cannot be written. Every process raises it.
        TypeError: a dtype that the format has no name for.
        ValueError: another suffix, no array, or several arrays for .npy; arrays that
            differ between processes, or lie on some of them only.

    Cost: one array is on the host at a time, and whole on each device while it is
        gathered.

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
    named: Any = arrays if hasattr(arrays, "items") else {path.stem: arrays}
    named = _split_quantized(path, named)
    named = {name: _check_array(name, array) for name, array in named.items()}
    check_savable(path, named)

    suffix = check_suffix(path)
    if suffix == ".safetensors":
        named = {name: named[name] for name in sort_names(named)}

    def write(values: Iterator[np.ndarray]) -> None:
        with replace_file(path) as file:
            if suffix == ".safetensors":
                write_safetensors(file, named, values)
            elif suffix == ".npz":
                write_npz(file, zip(named, values, strict=True))
            else:
                (array,) = values
                write_npy(file, array)

    write_together(path, named, write)


def check_savable(path: Path, arrays: Mapping[str, AnyArray]) -> None:
    """Refuse arrays that the format of `path` cannot hold unchanged.

    Raises:
        TypeError: a name that is no string, or a dtype that the format has no name for.
        ValueError: another suffix, a number of arrays or a name that it cannot hold.
    """
    suffix = check_suffix(path)
    check_count(path, len(arrays))
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(
                f"{path}: `arrays` must have names that are strings, got {name!r}. "
                "Convert it with str."
            )
        if "\0" in name:
            raise ValueError(
                f"{path}: `arrays` must have names without NUL, got {name!r}. "
                "Rename it."
            )
    if suffix == ".safetensors":
        check_entries(path, arrays)
        return

    for name, array in arrays.items():
        if not can_keep(array.dtype):
            raise TypeError(
                f"{path}: `arrays` must have dtypes that {suffix} files keep, got "
                f"{array.dtype} at {name}. Cast it, or write a .safetensors file."
            )


def _split_quantized(path: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays with the tensors of each quantised one in its place."""
    named: dict[str, Any] = {}
    for name, array in arrays.items():
        if not isinstance(array, QuantizedArray):
            named[name] = array
            continue
        tensors = list_tensors(name, array)
        taken = [each for each in tensors if each != name and each in arrays]
        if taken:
            raise ValueError(
                f"{path}: `arrays` must not hold {taken[0]!r}, which is a tensor of "
                f"the quantised {name!r}, got it. Rename it."
            )
        named |= tensors
    return named


def _check_array(name: str, array: Any) -> AnyArray:
    """Return an array of JAX itself, else one of NumPy; refuse anything but numbers."""
    is_array = hasattr(array, "shape") and hasattr(array, "dtype")
    if not is_array or isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"`arrays` must hold NumPy or JAX arrays, got {type(array).__name__} at "
            f"{name}. Wrap it with np.asarray."
        )

    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    elif jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"`arrays` must hold numbers, got a key at {name}. Save its numbers, "
            "jax.random.key_data(key)."
        )
    if array.dtype.hasobject:
        raise TypeError(
            f"`arrays` must hold numbers, got Python objects at {name}. Convert them."
        )
    return array


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
