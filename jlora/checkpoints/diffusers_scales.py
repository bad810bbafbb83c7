"""The scales that the metadata of a diffusers file says."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jlora.checkpoints.json_files import parse_json
from jlora.checkpoints.peft_config import check_config, find_scale, find_setting

METADATA_KEY = "lora_adapter_metadata"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def read_scales(
    path: pathlib.Path, metadata: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, float]:
    """Return {module: alpha / rank} of the modules that the metadata speaks of.

    The entry is the configuration of PEFT as JSON. A pipeline has one for each part,
    with the part in front of each setting: "unet.r". One model has plain names: "r".

    Args:
        path: of the file, named in errors.
        metadata: of the file.
        ranks: {module: rank of its factors}.

    Raises:
        ValueError: settings that `read_config` refuses, a module that belongs to no
            part, or a rank that disagrees with the settings.

    Source: `_pack_dict_with_prefix` and `save_lora_adapter` of diffusers 0.42.
    """
    owner = pathlib.Path(f"{path}: {METADATA_KEY}")
    text = metadata.get(METADATA_KEY)
    settings = {} if text is None else parse_json(text.encode(), owner)
    is_one_model = "r" in settings or "lora_alpha" in settings

    scales: dict[str, float] = {}
    for module, rank in ranks.items():
        part, _, inner = module.partition(".")
        if is_one_model:
            config, inner = settings, module
        elif part in COMPONENTS:
            config = _select(settings, part)
        else:
            raise ValueError(
                f"{path}: must hold modules of {', '.join(COMPONENTS)}, got {module}. "
                "Rename it."
            )
        if config:
            scales[module] = _find_scale(owner, config, inner, rank)
    return scales


def _select(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the settings of one part of a pipeline."""
    start = f"{part}."
    return {
        name.removeprefix(start): value
        for name, value in settings.items()
        if name.startswith(start)
    }


def _find_scale(
    owner: pathlib.Path, config: Mapping[str, Any], module: str, rank: int
) -> float:
    check_config(owner, {"peft_type": "LORA", **config})
    expected = find_setting(config, "r", module)
    if rank != expected:
        raise ValueError(
            f"{owner}: must say the ranks of the factors, got {expected} for {module}, "
            f"whose factors have {rank}. Correct the metadata."
        )
    return find_scale(config, module, rank)
