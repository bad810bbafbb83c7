"""The configuration of a PEFT adapter: ranks, scales and what else it says."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jlora.checkpoints.json_files import read_json

CONFIG_NAME = "adapter_config.json"
MODEL_NAME = "adapter_model.safetensors"

# Initialisations of PEFT that change the base when the adapter is created.
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")

# A group with a repetition inside that is repeated itself takes exponential time.
_NESTED = re.compile(r"[*+}]\??\)+[*+{]")
_MOST_REPETITIONS = 4


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Return the checked configuration of an adapter of the type LORA.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, of another type, or asks for what no file of factors
            can hold; the sentence names the entry.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    check_config(path, config)
    return config


def check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that `path` holds, as `read_config` does."""
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(path, "peft_type", "'LORA'", kind, "Only LoRA adapters have factors")

    _check_number(path, "r", config.get("r", 8), whole=True)
    _check_number(path, "lora_alpha", config.get("lora_alpha", 8))
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            _refuse(path, name, "an object", pattern, "Write it again")
        for key, value in pattern.items():
            check_pattern(key, f"{path}: `{name}`")
            _check_number(path, f"{name}[{key!r}]", value, whole=name[0] == "r")

    parameters = config.get("target_parameters") or []
    is_list = isinstance(parameters, list)
    if not is_list or not all(isinstance(name, str) for name in parameters):
        rule, advice = "a list of strings", "Write the paths of the parameters"
        _refuse(path, "target_parameters", rule, parameters, advice)

    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVING):
        _refuse(
            path,
            "init_lora_weights",
            "one that leaves the base unchanged",
            start,
            "These factors belong to a changed base. Save the adapter again with "
            "PEFT's path_initial_model_for_weight_conversion",
        )


def check_pattern(pattern: str, name: str) -> None:
    """Refuse a pattern that is no regular expression, or one that may never end."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name} must hold regular expressions, got {pattern!r} ({error}). "
            "Escape it."
        ) from None

    repetitions = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if _NESTED.search(pattern) or repetitions > _MOST_REPETITIONS:
        raise ValueError(
            f"{name} must hold regular expressions that end soon, got {pattern!r} "
            "with nested or many repetitions. Write the paths in full."
        )


def find_setting(config: Mapping[str, Any], kind: str, module: str) -> float:
    """Return the rank ("r") or alpha ("lora_alpha") of a module, by PEFT's rule.

    The first key that matches the end of the module's path decides.

    Source: `get_pattern_key` of peft 0.21.
    """
    name = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[kind]
    for key, value in (config.get(name) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(kind, 8)


def find_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank of a module, or alpha / √rank with rsLoRA."""
    alpha = float(find_setting(config, "lora_alpha", module))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def make_config(
    ranks: Mapping[str, int], *, parameters: list[str], **entries: Any
) -> dict[str, Any]:
    """Return the configuration of plain deltas whose factors hold the scale.

    Modules of other ranks than the most frequent one have a `rank_pattern`, and an
    equal `alpha_pattern`: the scale is 1 everywhere.

    Args:
        ranks: {module path: rank}.
        parameters: the paths among them that are parameters of experts.
        entries: more entries, which replace these.
    """
    values = list(ranks.values())
    common = max(set(values), key=lambda rank: (values.count(rank), rank))
    others = {
        "^" + re.escape(module): rank
        for module, rank in ranks.items()
        if rank != common
    }
    config = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(set(ranks) - set(parameters)),
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
    if parameters:
        config["target_parameters"] = parameters
    return config | entries


def _check_number(
    path: pathlib.Path, name: str, value: Any, *, whole: bool = False
) -> None:
    kinds = (int,) if whole else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        _refuse(
            path,
            name,
            "a whole number above 0" if whole else "a number above 0",
            value,
            "Write the number of the training run",
        )


def _refuse(path: pathlib.Path, name: str, rule: str, value: Any, advice: str) -> None:
    raise ValueError(f"{path}: `{name}` must be {rule}, got {value!r}. {advice}.")
