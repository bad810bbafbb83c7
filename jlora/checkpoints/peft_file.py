"""`open_peft`: an adapter in PEFT's files whose factors are read when they are used."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora import _checks
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.experts import split_experts, stack_experts
from jlora.checkpoints.peft_config import (
    CONFIG_NAME,
    MODEL_NAME,
    find_scale,
    find_setting,
    read_config,
)
from jlora.checkpoints.peft_keys import Key, parse_key
from jlora.factors import Factors

# What an adapter can hold beside factors, by the part that `parse_key` names.
OTHERS = {
    "saved": "whole parameters (modules_to_save, bias)",
    "magnitude": "magnitudes of DoRA",
    "bias": "biases of lora_B",
    "tokens": "rows of tokens",
}


class PeftModule(NamedTuple):
    """Where the factors of one module are, and how large."""

    a: str  # name of the tensor lora_A
    b: str
    num_inputs: int
    num_outputs: int
    rank: int
    num_experts: int | None  # None: a single matrix
    scale: float


class PeftFile(NamedTuple):
    """An open adapter; see `open_peft`."""

    folder: pathlib.Path
    config: dict[str, Any]
    checkpoint: Checkpoint
    keys: dict[str, Key]  # what the name of each tensor says
    modules: dict[str, PeftModule]  # by the path of the module or parameter

    def read(self, path: str) -> Factors:
        """Return the factors of a module, with the scale in v."""
        module, file = self.modules[path], self.checkpoint.path
        a, b = (
            read_finite(self.checkpoint, name, file) for name in (module.a, module.b)
        )
        if module.num_experts is None:
            u, v = a.T, b.T
        else:
            u, v = stack_experts(a, b, module.num_experts)

        with np.errstate(over="ignore", invalid="ignore"):
            pair = make_pair(u, v, scale=module.scale)
        if not np.isfinite(pair.v).all():
            raise ValueError(
                f"{self.folder}: must have a scale that keeps the factors finite, got "
                f"{module.scale} for {path}. Correct lora_alpha in {CONFIG_NAME}."
            )
        return pair

    def find_dtype(self, path: str) -> str:
        """Return the name of the dtype in which the factors of a module are stored."""
        return self.checkpoint.info(self.modules[path].a).dtype

    def list_others(self, part: str) -> dict[str, str]:
        """Return {module: name of its tensor} of a part that is no factor."""
        return {key.module: name for name, key in self.keys.items() if key.part == part}


def open_peft(folder: str | os.PathLike[str]) -> PeftFile:
    """Return an open adapter; names and shapes are checked, no factor is read.

    Raises:
        OSError, ValueError: as `read_peft`, except for NaN and Inf.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    file = folder / MODEL_NAME
    if not file.exists() and (folder / "adapter_model.bin").exists():
        file = folder / "adapter_model.bin"  # refused below: it is pickled
    checkpoint = open_checkpoint(file)

    keys = {name: parse_key(name) for name in checkpoint}
    modules = {}
    for module, sides in _pair_factors(file, keys).items():
        path, found = _describe_module(checkpoint, config, module, sides)
        modules[path] = found
    adapter = PeftFile(folder, config, checkpoint, keys, modules)
    if not modules and not any(map(adapter.list_others, ("saved", "tokens"))):
        raise ValueError(f"{file}: must hold factors, got none. Save it again.")
    return adapter


def check_only_factors(adapter: PeftFile) -> None:
    """Refuse an adapter with parts that are no factors."""
    for part, kind in OTHERS.items():
        found = adapter.list_others(part)
        if found:
            raise ValueError(
                f"{adapter.folder}: must hold factors only, got {kind} for "
                f"{len(found)} modules, such as {next(iter(found))}. Read it with "
                "jlora.checkpoints.read_peft, or merge it with `jlora merge`."
            )


def make_pair(u: Any, v: Any, *, scale: float = 1.0) -> Factors:
    """Return factors that are NumPy arrays, as files hold them, with a scale in v.

    v has at least float32 unless the scale is 1.
    """
    if scale != 1.0:
        wide = np.float64 if v.dtype == np.float64 else np.float32
        v = v.astype(wide) * wide(scale)
    return Factors(u, v)


def _pair_factors(
    file: pathlib.Path, keys: Mapping[str, Key]
) -> dict[str, dict[str, str]]:
    """Return {module: {"A" or "B": name of the tensor}}, both there for each."""
    pairs: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        if key.part in ("A", "B"):
            sides = pairs.setdefault(key.module, {})
            if key.part in sides:
                raise ValueError(
                    f"{file}: must hold one adapter, got {sides[key.part]} and {name}. "
                    "Save one of them."
                )
            sides[key.part] = name

    for module, sides in pairs.items():
        if len(sides) != 2:
            raise ValueError(
                f"{file}: must hold both factors of {module}, got only "
                f"lora_{next(iter(sides))}. Save the adapter again."
            )
    return pairs


def _describe_module(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    module: str,
    sides: Mapping[str, str],
) -> tuple[str, PeftModule]:
    """Return the path and the place of the factors of one module."""
    names = config.get("target_parameters") or []
    parameter = split_experts(module, names)
    path = module if parameter is None else parameter
    rank = int(find_setting(config, "r", path))

    file = checkpoint.path
    a, b = (checkpoint.info(sides[side]).shape for side in "AB")
    for side, shape in (("A", a), ("B", b)):
        if 0 in shape:
            raise ValueError(_refuse_empty(file, sides[side], shape))
    if len(a) != 2 or len(b) != 2:
        raise ValueError(
            f"{file}: must hold factors with two axes, got {a} and {b} at "
            f"{module}. Factors of convolutions are not read; leave the layer out."
        )
    is_stack = parameter is not None and a[0] % rank == 0
    if a[0] != b[1] or not (a[0] == rank or is_stack):
        raise ValueError(
            f"{file}: must hold factors of the rank in {CONFIG_NAME}, {rank} for "
            f"{path}, got lora_A {a} and lora_B {b}. Correct the file."
        )
    num_experts = a[0] // rank if is_stack else None
    scale = find_scale(config, path, rank)
    return path, PeftModule(
        sides["A"], sides["B"], a[1], b[0], rank, num_experts, scale
    )


def read_finite(
    arrays: Mapping[str, np.ndarray], name: str, path: pathlib.Path
) -> np.ndarray:
    """Return one array of the file at `path`, floating, finite and not empty."""
    array = arrays[name]
    if not _checks.is_floating(array.dtype):
        raise ValueError(
            f"{path}: must hold floating tensors of 16 to 64 bits, got "
            f"{array.dtype} at {name}. Convert it first."
        )
    if 0 in array.shape:
        raise ValueError(_refuse_empty(path, name, array.shape))
    check_finite(array, name, str(path))
    return array


def check_finite(array: np.ndarray, name: str, owner: str) -> None:
    if not np.isfinite(array).all():
        raise ValueError(
            f"{owner} must be finite, got NaN or Inf in {name}. Train it again."
        )


def _refuse_empty(path: pathlib.Path, name: str, shape: tuple[int, ...]) -> str:
    return (
        f"{path}: must hold factors that were gathered, got shape {shape} at {name}. "
        "Save the adapter again from all devices."
    )
