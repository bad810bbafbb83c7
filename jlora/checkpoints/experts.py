"""Factors of stacked experts, as PEFT stores them under `target_parameters`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The order in which the experts of transformers define their parameters. Others keep
# the order of the configuration.
_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def _rank_parameter(path: str) -> int:
    name = path.rpartition(".")[2]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def join_experts(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return lora_A [experts * r, in] and lora_B [out, r * experts].

    In lora_A the expert is the slow axis of the rows, in lora_B the fast one of the
    columns.

    Args:
        u: [experts, in, r].
        v: [experts, r, out].
    """
    num_experts, num_inputs, rank = u.shape
    a = u.swapaxes(1, 2).reshape(num_experts * rank, num_inputs)
    b = v.transpose(2, 1, 0).reshape(-1, rank * num_experts)
    return a, b


def stack_experts(
    a: np.ndarray, b: np.ndarray, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return u and v of lora_A and lora_B: the inverse of `join_experts`."""
    rank = a.shape[0] // num_experts
    u = a.reshape(num_experts, rank, -1).swapaxes(1, 2)
    v = b.reshape(-1, rank, num_experts).transpose(2, 1, 0)
    return u, v


def name_experts(parameters: Sequence[str]) -> dict[str, str]:
    """Return {path of a parameter: path under which PEFT stores its factors}.

    PEFT wraps the module once for each parameter, in the order in which the module
    defines them: the last one is stored under the module itself, and each one before it
    one `base_layer` further inside.
    """
    modules: dict[str, list[str]] = {}
    for path in sorted(parameters, key=_rank_parameter):
        modules.setdefault(path.rpartition(".")[0], []).append(path)
    return {
        path: module + ".base_layer" * (len(paths) - 1 - position)
        for module, paths in modules.items()
        for position, path in enumerate(paths)
    }


def split_experts(module: str, parameters: Sequence[str]) -> str | None:
    """Return the path of the parameter whose factors lie under `module`, or None.

    Args:
        module: the path in the file, maybe with ".base_layer" at its end.
        parameters: the `target_parameters` of the configuration: full paths, or their
            ends.
    """
    depth = 0
    owner = module
    while owner.endswith(".base_layer"):
        owner, depth = owner.removesuffix(".base_layer"), depth + 1

    ends = []
    for parameter in sorted(parameters, key=_rank_parameter):
        parent, _, name = parameter.rpartition(".")
        if owner == parent or owner.endswith("." + parent) or not parent:
            ends.append(name)
    position = len(ends) - 1 - depth
    return f"{owner}.{ends[position]}" if 0 <= position < len(ends) else None
