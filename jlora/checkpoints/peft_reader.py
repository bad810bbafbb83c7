"""`read_peft`: everything that an adapter in PEFT's files holds."""

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


class PeftAdapter(NamedTuple):
    """Everything that an adapter of PEFT holds; `load_peft` returns the first two.

    Example:
        >>> import jlora
        >>> jlora.checkpoints.PeftAdapter._fields[:2]
        ('factors', 'config')
    """

    factors: dict[str, Factors]  # by the path of the module, with the scale folded in
    config: dict[str, Any]
    saved: dict[str, np.ndarray]  # parameters that replace those of the model
    magnitudes: dict[str, np.ndarray]  # of DoRA, by module
    biases: dict[str, np.ndarray]  # added to those of the model, by module, scaled
    tokens: dict[str, np.ndarray]  # new rows of an embedding, by module
    embeddings: frozenset[str] = frozenset()  # modules stored as embeddings


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Return everything that a PEFT adapter holds, see `load_peft`.

    Raises:
        OSError, ValueError: as `load_peft`, except for parts that are no factors.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> delta = jlora.Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> jlora.save_peft(folder.name, {"layers.0.up_proj": delta})
        >>> jlora.checkpoints.read_peft(folder.name).saved
        {}
        >>> folder.cleanup()
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    file = folder / MODEL_NAME
    if not file.exists() and (folder / "adapter_model.bin").exists():
        file = folder / "adapter_model.bin"  # refused below: it is pickled
    checkpoint = open_checkpoint(file)

    keys = {name: parse_key(name) for name in checkpoint}
    pairs = _pair_factors(file, keys)
    embeddings = frozenset(key.module for key in keys.values() if key.is_embedding)
    adapter = PeftAdapter({}, config, {}, {}, {}, {}, embeddings)
    for module, sides in pairs.items():
        adapter.factors.update(_read_module(checkpoint, module, sides, config))

    for name, key in keys.items():
        place = {
            "saved": adapter.saved,
            "magnitude": adapter.magnitudes,
            "bias": adapter.biases,
            "tokens": adapter.tokens,
        }.get(key.part)
        if place is None:
            continue
        array = read_finite(checkpoint, name, file)
        if key.part == "bias":
            rank = checkpoint.info(pairs[key.module]["A"]).shape[0]
            array = array * np.float32(find_scale(config, key.module, rank))
        place[key.module] = array

    if not (adapter.factors or adapter.saved or adapter.tokens):
        raise ValueError(f"{file}: must hold factors, got none. Save it again.")
    return adapter


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


def _read_module(
    checkpoint: Checkpoint,
    module: str,
    sides: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, Factors]:
    """Return {path: factors with the scale in v} of one module."""
    a, b = (read_finite(checkpoint, sides[side], checkpoint.path) for side in "AB")
    names = config.get("target_parameters") or []
    parameter = split_experts(module, names)
    path = module if parameter is None else parameter
    rank = find_setting(config, "r", path)

    file = checkpoint.path
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"{file}: must hold factors with two axes, got {a.shape} and {b.shape} at "
            f"{module}. Factors of convolutions are not read; leave the layer out."
        )
    is_stack = parameter is not None and a.shape[0] % rank == 0
    if a.shape[0] != b.shape[1] or not (a.shape[0] == rank or is_stack):
        raise ValueError(
            f"{file}: must hold factors of the rank in {CONFIG_NAME}, {rank} for "
            f"{path}, got lora_A {a.shape} and lora_B {b.shape}. Correct the file."
        )

    scale = find_scale(config, path, int(rank))
    if is_stack:
        u, v = stack_experts(a, b, a.shape[0] // int(rank))
    else:
        u, v = a.T, b.T
    return {path: make_pair(u, v, scale=scale)}


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
        raise ValueError(
            f"{path}: must hold factors that were gathered, got shape "
            f"{array.shape} at {name}. Save the adapter again from all devices."
        )
    check_finite(array, name, str(path))
    return array


def check_finite(array: np.ndarray, name: str, owner: str) -> None:
    if not np.isfinite(array).all():
        raise ValueError(
            f"{owner} must be finite, got NaN or Inf in {name}. Train it again."
        )
