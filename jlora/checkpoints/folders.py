"""Folders with a model: which files hold which arrays."""

from __future__ import annotations

import pathlib
import stat
from typing import Any

from jlora.checkpoints.json_files import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_files(path: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Return {file: names of its arrays} of a checkpoint; None: all that it holds.

    Raises:
        OSError: `path` does not exist.
        ValueError: no safetensors file, several without an index, pickled weights, or
            an index that cannot be followed.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return _find_in_folder(path)
    if path.suffix in _PICKLED:
        raise ValueError(_refuse_pickle(path))
    if not stat.S_ISREG(mode) or path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: must be a .safetensors file, an .npy or .npz file or a folder "
            "of a model, got another. Name one of them."
        )
    return {path: None}


def read_model_config(path: pathlib.Path) -> dict[str, Any]:
    """Return the config.json of a model folder; empty for a file, or without one."""
    config = path / "config.json"
    return read_json(config) if config.is_file() else {}


def find_side_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a model folder that hold no weights, and its index."""
    weights = (".safetensors", *_PICKLED, ".h5", ".msgpack", ".gguf", ".onnx")
    return [
        _check_inside(folder, entry.name)
        for entry in sorted(folder.iterdir())
        if entry.is_file()
        and not entry.name.startswith(".")
        and not entry.name.endswith(weights)
        and not entry.name.endswith(".bin.index.json")
    ]


def _find_in_folder(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    # As transformers does: one whole file first, then the index.
    if (folder / _SINGLE).exists():
        return {_check_inside(folder, _SINGLE): None}
    if (folder / _INDEX).exists():
        return _follow_index(folder, _INDEX)

    names = sorted(entry.name for entry in folder.iterdir())
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        return _follow_index(folder, indices[0])
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1:
        return {_check_inside(folder, files[0]): None}

    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled and not files:
        raise ValueError(_refuse_pickle(folder / pickled[0]))
    raise ValueError(
        f"{folder}: must hold {_SINGLE}, one index or one .safetensors file, got "
        f"{len(indices)} indices and {len(files)} files. Name the file itself."
    )


def _follow_index(
    folder: pathlib.Path, name: str
) -> dict[pathlib.Path, set[str] | None]:
    """Return the files that an index names, each with the names of its arrays."""
    index = folder / name
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{index}: must hold a `weight_map` of names and files, got "
            f"{'none' if places is None else type(places).__name__}. Download it again."
        )

    found: dict[str, set[str] | None] = {}
    for tensor, file in places.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise ValueError(
                f"{index}: must name .safetensors files beside it, got {file!r} for "
                f"{tensor}. Write the index again."
            )
        names = found.setdefault(file, set())
        assert names is not None
        names.add(tensor)

    missing = [file for file in found if not (folder / file).exists()]
    if missing:
        raise ValueError(
            f"{index}: must name files that exist, got {len(missing)} that do not: "
            f"{', '.join(missing[:8])}. Download them."
        )
    return {_check_inside(folder, file): names for file, names in found.items()}


def _is_plain_name(name: str) -> bool:
    """Return whether a name is one of a file in the same folder, on every system."""
    is_plain = not any(char in name for char in "/\\:\0")
    return is_plain and name.endswith(".safetensors") and not name.startswith(".")


def _check_inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the file of a folder, which must not be a link out of it.

    The cache of huggingface_hub is one exception: in `snapshots/<revision>` lie links
    to the folder `blobs` of the same model.
    """
    path, home = folder / name, folder.resolve()
    target = path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{path}: must be a file in its folder, got a link to {target}. Copy the "
            "file here."
        )
    if not target.is_file():
        raise ValueError(f"{path}: must be a regular file, got none. Choose a file.")
    return path


def _refuse_pickle(path: pathlib.Path) -> str:
    return (
        f"{path}: must be a .safetensors file, got pickled weights, which can run any "
        "code when they are read. Convert them with "
        "`safetensors.torch.save_file(torch.load(path, weights_only=True), new)`."
    )
