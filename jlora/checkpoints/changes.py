"""The changes that adapters make to the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora._types import Float
from jlora.checkpoints.architectures import (
    Layouts,
    Slice,
    find_family,
    find_tensors,
    match_layout,
)
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.peft_reader import PeftAdapter
from jlora.factors import Factors


@dataclasses.dataclass
class Change:
    """The change of one tensor of a checkpoint: in this order, whatever is there."""

    pairs: list[Factors]  # added: u @ v of the matrix in the tensor's own orientation
    magnitude: np.ndarray | None = None  # of DoRA, by output
    outputs_first: bool = True  # whether the outputs are the first axis
    addend: np.ndarray | None = None  # added
    rows: tuple[Sequence[int], np.ndarray] | None = None  # replaced
    value: Any = None  # in its place: an array, or a `LazyTensor`


def find_changes(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    adapters: Sequence[tuple[PeftAdapter, float]],
    layouts: Layouts,
) -> dict[str, Change]:
    """Return {name of a tensor: `Change`} of weighted adapters.

    Args:
        checkpoint: the model.
        config: its config.json; empty if it has none.
        adapters: (adapter, weight) each.
        layouts: the user's own {regular expression: layout}.

    Raises:
        ValueError: a module that the checkpoint does not hold, factors of another
            shape, or parts that cannot be weighted.
    """
    changes: dict[str, Change] = {}
    for adapter, weight in adapters:
        for module, factors in adapter.factors.items():
            pieces = _list_pieces(checkpoint, config, adapter, module, factors, layouts)
            _add_factors(changes, pieces, factors, weight)
        _add_others(changes, checkpoint, adapter, weight)
    return changes


def _list_pieces(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    adapter: PeftAdapter,
    module: str,
    factors: Factors,
    layouts: Layouts,
) -> list[tuple[Slice, bool]]:
    """Return [(part of a tensor, whether it is stored as [out, in])] of a module."""
    num_experts = factors.u.shape[0] if factors.u.ndim == 3 else None
    pieces = find_tensors(module, set(checkpoint), num_experts)
    if pieces is None:
        raise ValueError(
            f"{checkpoint.path}: must hold the weight of {module}, which the adapter "
            "changes, got none. Choose the model that the adapter was trained on."
        )
    found = []
    for piece in pieces:
        u, v = take_slice(factors, piece)
        shape, sizes = checkpoint.info(piece.tensor).shape, (u.shape[-2], v.shape[-1])
        is_oi = _is_outputs_first(
            checkpoint, config, adapter, module, shape, sizes, layouts
        )
        found.append((piece, is_oi))
    return found


def _add_factors(
    changes: dict[str, Change],
    pieces: Sequence[tuple[Slice, bool]],
    factors: Factors,
    weight: float,
) -> None:
    for piece, outputs_first in pieces:
        u, v = take_slice(factors, piece)
        change = changes.setdefault(piece.tensor, Change([]))
        u = u * u.dtype.type(weight) if weight != 1.0 else u
        pair = make_pair(v.swapaxes(-1, -2), u.swapaxes(-1, -2))
        change.pairs.append(pair if outputs_first else make_pair(u, v))
        change.outputs_first = outputs_first


def take_slice(
    factors: Factors, piece: Slice
) -> tuple[Float[np.ndarray, ...], Float[np.ndarray, ...]]:
    """Return the factors of one expert, and of some of the outputs."""
    u, v = (np.asarray(part) for part in factors)
    if piece.expert is not None:
        u, v = u[piece.expert], v[piece.expert]
    part, num_parts = piece.outputs
    if num_parts > 1:
        size = v.shape[-1] // num_parts
        v = v[..., part * size : (part + 1) * size]
    return u, v


def _is_outputs_first(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    adapter: PeftAdapter,
    module: str,
    shape: tuple[int, ...],
    sizes: tuple[int, int],
    layouts: Layouts,
) -> bool:
    """Return whether a tensor is stored as [out, in]; square ones by their family."""
    num_inputs, num_outputs = sizes
    given = match_layout(module, layouts)
    allowed = {None: (sizes, sizes[::-1]), "io": (sizes,), "oi": (sizes[::-1],)}[given]
    fits = shape[-2:] in allowed
    if len(shape) not in (2, 3) or not fits:
        raise ValueError(
            f"{checkpoint.path}: must hold a weight of {num_inputs} inputs and "
            f"{num_outputs} outputs for {module}, got shape {shape}. Choose the model "
            "that the adapter was trained on."
        )
    if given is not None:
        return given == "oi"
    if num_inputs != num_outputs:
        return shape[-2:] == (num_outputs, num_inputs)

    model_type = config.get("model_type")
    if len(shape) == 3:
        # Before 0.20 PEFT took the first axis of every expert for its inputs.
        version = str(adapter.config.get("peft_version", "1")).split(".")
        is_old = version[0] == "0" and len(version) > 1 and version[1].isdigit()
        is_old = is_old and int(version[1]) < 20
        return not (find_family(model_type).has_experts_io or is_old)
    is_io = module in adapter.embeddings or adapter.config.get("fan_in_fan_out")
    family = find_family(model_type)
    return not (is_io or re.search(family.inputs_first, module))


def _add_others(
    changes: dict[str, Change],
    checkpoint: Checkpoint,
    adapter: PeftAdapter,
    weight: float,
) -> None:
    """Add magnitudes, biases, token rows and whole parameters."""
    others = (adapter.saved, adapter.magnitudes, adapter.tokens)
    if weight != 1.0 and any(others):
        name = next(iter({**others[0], **others[1], **others[2]}))
        raise ValueError(
            f"`adapters` must have the weight 1 to bring {name}, which is no delta, "
            f"got {weight}. Merge that adapter with weight 1."
        )

    for module, magnitude in adapter.magnitudes.items():
        name = _find_one(checkpoint, module)
        change = changes.get(name)
        if change is None or change.magnitude is not None or len(change.pairs) > 1:
            raise ValueError(
                f"`adapters` must change {module} by one adapter with DoRA, got "
                "several. Merge them one after another."
            )
        change.magnitude = magnitude
    for module, bias in adapter.biases.items():
        name = _find_one(checkpoint, f"{module}.bias")
        change = changes.setdefault(name, Change([]))
        addend = bias * np.float32(weight)
        change.addend = addend if change.addend is None else change.addend + addend
    for module, rows in adapter.tokens.items():
        indices = _find_indices(adapter, module, len(rows))
        changes.setdefault(_find_one(checkpoint, module), Change([])).rows = (
            indices,
            rows,
        )
    for name, value in adapter.saved.items():
        found = find_tensors(name, set(checkpoint), None)
        known = found[0].tensor if found else name
        changes.setdefault(known, Change([])).value = value


def _find_one(checkpoint: Checkpoint, module: str) -> str:
    found = find_tensors(module, set(checkpoint), None)
    if found is None or len(found) != 1:
        raise ValueError(
            f"{checkpoint.path}: must hold {module}, which the adapter changes, got "
            "none. Choose the model that the adapter was trained on."
        )
    return found[0].tensor


def _find_indices(adapter: PeftAdapter, module: str, count: int) -> list[int]:
    """Return the rows of an embedding that `trainable_token_indices` names."""
    given = adapter.config.get("trainable_token_indices")
    if isinstance(given, dict):
        ends = (key for key in given if module == key or module.endswith("." + key))
        given = given.get(next(ends, ""))
    is_list = isinstance(given, list) and all(type(i) is int and i >= 0 for i in given)
    if not isinstance(given, list) or not is_list or len(given) != count:
        raise ValueError(
            f"`trainable_token_indices` must name {count} rows of {module}, got "
            f"{given!r}. Correct adapter_config.json."
        )
    return list(given)
