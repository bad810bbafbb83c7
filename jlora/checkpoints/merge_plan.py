"""Which tensors each file of a merged checkpoint holds, and its side files."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.changes import Change
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.float_weights import check_changeable, is_fp8
from jlora.checkpoints.json_files import write_json
from jlora.checkpoints.output_folder import copy_file
from jlora.checkpoints.peft_config import CONFIG_NAME, MODEL_NAME
from jlora.checkpoints.safetensors import find_code
from jlora.checkpoints.tied import Untied


class OutputTensor(NamedTuple):
    """One tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    source: str | None  # the tensor of the input; None: only a change
    change: Change | None


def plan_files(
    checkpoint: Checkpoint, changes: Mapping[str, Change], untied: Untied | None
) -> dict[pathlib.Path, list[OutputTensor]]:
    """Return the tensors of each new file, in the order of its data."""
    files: dict[pathlib.Path, list[OutputTensor]] = {
        path: [] for path in checkpoint.files
    }
    for name in checkpoint:
        place = checkpoint.locate(name)
        tensor = OutputTensor(
            name, *place[:2], place.num_bytes, name, changes.get(name)
        )
        info = checkpoint.info(name)
        files[info.file].append(tensor)
        if tensor.change is not None:
            value = tensor.change.value
            if value is not None:
                _check_shape(name, value, place.shape)
            if value is None or is_fp8(info.dtype):
                check_changeable(info.file, name, info.dtype)

        if untied is not None and untied.embedding == name:
            head = tensor._replace(name=untied.head, change=untied.change)
            files[info.file].append(head)

    # A whole module that the base lacks, such as a new head of a classifier.
    last = checkpoint.files[-1]
    known = {tensor.name for plan in files.values() for tensor in plan}
    for name, change in changes.items():
        if name not in known and change.value is not None:
            value = change.value
            code = find_code(value.dtype)
            files[last].append(
                OutputTensor(name, code, value.shape, value.nbytes, None, change)
            )
    return files


def _check_shape(name: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name}: must have the shape of the model, {shape}, to be replaced, got "
            f"{value.shape}. Choose the model that the adapter was trained on."
        )


def make_side_file(
    path: pathlib.Path,
    files: Mapping[pathlib.Path, Sequence[OutputTensor]],
    config: Mapping[str, Any],
    num_bytes: int,
    is_untied: bool,
) -> Any:
    """Return the function that writes a side file: a copy, unless it must change."""
    if path.name == "config.json" and is_untied:
        return lambda file: write_json(file, {**config, "tie_word_embeddings": False})
    if path.name.endswith(".safetensors.index.json"):
        places = {t.name: file.name for file, plan in files.items() for t in plan}
        index = {
            "metadata": {"total_size": num_bytes},
            "weight_map": dict(sorted(places.items())),
        }
        return lambda file: write_json(file, index)
    return functools.partial(copy_file, path)


def list_inputs(
    checkpoint: Checkpoint, weighted: Sequence[tuple[pathlib.Path, float]]
) -> list[pathlib.Path]:
    files = list(checkpoint.files)
    for folder, _ in weighted:
        files += [folder / CONFIG_NAME, folder / MODEL_NAME]
    return files
