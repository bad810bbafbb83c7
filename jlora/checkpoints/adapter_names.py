"""The names of tensors in adapters of kohya, diffusers and qwix."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

from jlora.checkpoints.peft_keys import PREFIX


class AdapterKey(NamedTuple):
    """The meaning of the name of a tensor."""

    format: str  # "kohya", "diffusers" or "qwix"
    module: str  # as the file names it
    part: str  # "down" (lora_A), "up" (lora_B) or "alpha"


class _Format(NamedTuple):
    """How one format names its tensors."""

    module: str  # regular expression on the name of a module
    ends: dict[str, str]  # {end of the name of a tensor: its part}


# In this order: the first that fits decides.
_FORMATS = {
    "kohya": _Format(
        r"lora_(unet|transformer|te[123]?)_[^.]+",
        {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"},
    ),
    "diffusers": _Format(
        r".+",
        {
            ".lora_A.weight": "down",
            ".lora_B.weight": "up",
            ".lora.down.weight": "down",
            ".lora.up.weight": "up",
            ".lora_linear_layer.down.weight": "down",
            ".lora_linear_layer.up.weight": "up",
            ".alpha": "alpha",
        },
    ),
    "qwix": _Format(r".*[\w\-]", {"_lora_a": "down", "_lora_b": "up"}),
}

# Parts of names that stand for more than two factors.
_OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle factor",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "a bias",
}


def parse_names(path: pathlib.Path, names: Iterable[str]) -> dict[str, AdapterKey]:
    """Return {name of a tensor: its key}, all of one format.

    Raises:
        ValueError: no tensors, one that is no factor, or tensors of two formats.
    """
    keys = {name: _parse_name(path, name) for name in names}
    firsts = {key.format: name for name, key in reversed(keys.items())}
    if not firsts:
        raise ValueError(f"{path}: must hold factors, got none. Save it again.")
    if len(firsts) > 1:
        found = " and ".join(f"{firsts[kind]} of {kind}" for kind in sorted(firsts))
        raise ValueError(
            f"{path}: must hold one format, got {found}. Save one file for each."
        )
    return keys


def pair_names(
    path: pathlib.Path, keys: dict[str, AdapterKey]
) -> dict[str, dict[str, str]]:
    """Return {module: {part: name of its tensor}}, both factors there for each."""
    pairs: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        parts = pairs.setdefault(key.module, {})
        if key.part in parts:
            raise ValueError(
                f"{path}: must hold one adapter, got {parts[key.part]} and {name}. "
                "Save one of them."
            )
        parts[key.part] = name

    for module, parts in pairs.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(
                f"{path}: must hold both factors of {module}, got only "
                f"{' and '.join(parts.values())}. Save the adapter again."
            )
    return pairs


def _parse_name(path: pathlib.Path, name: str) -> AdapterKey:
    for kind, (pattern, ends) in _FORMATS.items():
        plain = _join_keys(name) if kind == "qwix" else name
        for end, part in ends.items():
            module = plain.removesuffix(end)
            if module != plain and re.fullmatch(pattern, module):
                return _check_key(path, name, AdapterKey(kind, module, part))
    raise ValueError(_refuse_name(path, name))


def _check_key(path: pathlib.Path, name: str, key: AdapterKey) -> AdapterKey:
    """Refuse a tensor of PEFT: its scale is in another file."""
    if key.module.startswith(PREFIX):
        raise ValueError(
            f"{path}: must be the folder of an adapter of PEFT, whose "
            f"adapter_config.json says the scale, got {name} without it. Pass the "
            "folder."
        )
    return key


def _refuse_name(path: pathlib.Path, name: str) -> str:
    kinds = [kind for part, kind in _OTHERS.items() if part in name]
    if kinds:
        advice = "Merge it into the model with the program that trained it"
    else:
        advice = "Remove the tensor, or rename it as one of the formats does"
    found = f"{name}, {kinds[0]}" if kinds else f"the unknown tensor {name}"
    return (
        f"{path}: must hold factors of LoRA only (kohya, diffusers, qwix), got {found}."
        f" {advice}."
    )


def _join_keys(name: str) -> str:
    """Return "layers.0.kernel" for "layers/0/kernel" and "['layers'][0]['kernel']"."""
    keys = re.findall(r"[\w\-]+", name)
    return ".".join(keys[:-1] if keys[-1:] == ["value"] else keys)
