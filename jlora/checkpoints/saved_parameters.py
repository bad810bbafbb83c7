"""Whole parameters in an adapter, as PEFT stores them beside factors."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.lazy_tensors import LazyTensor


class SavedParameters(NamedTuple):
    """The parameters to store whole."""

    tensors: dict[str, LazyTensor]  # by their names in the adapter, without the prefix
    config: dict[str, Any]  # entries of the configuration that belong to them


def plan_saved(
    names: Iterable[str], adapted: Collection[str], source: Checkpoint
) -> SavedParameters:
    """Return some parameters of a checkpoint as PEFT stores them.

    PEFT replaces whole modules (`modules_to_save`), so the other parameters of such a
    module are stored too. The bias of a module that has factors is one of PEFT's
    trained biases, which it stores under `base_layer`.

    Args:
        names: of tensors in the checkpoint.
        adapted: modules with factors.
        source: the checkpoint.
    """
    tensors: dict[str, LazyTensor] = {}
    modules: set[str] = set()
    has_bias = False
    for name in names:
        module, _, parameter = name.rpartition(".")
        if module in adapted:
            has_bias = True
            key = f"{module}.base_layer.{parameter}"
            tensors[key] = LazyTensor(source, name).dequantize()
        else:
            modules.add(module)

    scales = {*source.scales.values()}
    for name in source:
        if name.rpartition(".")[0] in modules and name not in scales:
            tensors[name] = LazyTensor(source, name).dequantize()
    config: dict[str, Any] = {"modules_to_save": sorted(modules) or None}
    if has_bias:
        config["bias"] = "lora_only"
    return SavedParameters(tensors, config)


def can_be_saved(name: str, source: Checkpoint) -> bool:
    """Return whether the module of a parameter has no modules inside.

    PEFT would store these too, and replace their layers.
    """
    module = name.rpartition(".")[0]
    start = f"{module}."
    inner = (each[len(start) :] for each in source if each.startswith(start))
    return bool(module) and not any("." in rest for rest in inner)
