"""Which arrays a path holds: the choice between the formats of checkpoints."""

from __future__ import annotations

import pathlib

from jlora.checkpoints.folders import find_files
from jlora.checkpoints.numpy_arrays import SUFFIXES, list_numpy_arrays
from jlora.checkpoints.orbax_arrays import is_orbax, list_orbax_arrays
from jlora.checkpoints.safetensors_header import read_header
from jlora.checkpoints.stored_arrays import (
    SafetensorsArray,
    StoredArray,
    find_state,
)


def list_arrays(path: pathlib.Path) -> dict[str, StoredArray]:
    """Return {name: array} of a file or folder, in the order of the files.

    Raises:
        OSError, ValueError: see `open_checkpoint`.
    """
    if path.suffix in SUFFIXES and not path.is_dir():
        return dict(list_numpy_arrays(path))
    if path.is_dir() and is_orbax(path):
        return dict(list_orbax_arrays(path))
    return dict(_list_tensors(path))


def _list_tensors(path: pathlib.Path) -> dict[str, SafetensorsArray]:
    """Return the tensors of safetensors files."""
    tensors: dict[str, SafetensorsArray] = {}
    for file, names in find_files(path).items():
        entries, state = read_header(file).entries, find_state(file)
        absent = [name for name in names or () if name not in entries]
        if absent:
            raise ValueError(
                f"{file}: must hold the arrays that the index names, got none called "
                f"{absent[0]!r}. Download the file again."
            )
        for name, entry in entries.items():
            if names is not None and name not in names:
                continue  # of an earlier save, or another file holds it
            tensors[name] = SafetensorsArray(state, name, entry)
    return tensors
