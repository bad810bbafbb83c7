"""The tensors of an adapter's file: names, shapes, order, before there are values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jlora.checkpoints.architectures import EMBEDDINGS
from jlora.checkpoints.experts import join_experts, name_experts
from jlora.checkpoints.output_folder import write_array
from jlora.checkpoints.peft_config import make_config
from jlora.checkpoints.peft_keys import PREFIX, format_keys
from jlora.checkpoints.safetensors import find_code, format_header
from jlora.factors import Factors


class FactorShape(NamedTuple):
    """The sizes of the factors of one module."""

    num_inputs: int
    num_outputs: int
    rank: int
    num_experts: int | None = None
    dtype: np.dtype = np.dtype(np.float32)


class AdapterLayout(NamedTuple):
    """Where the factors of each module go."""

    shapes: dict[str, FactorShape]  # by module
    keys: dict[str, tuple[str, str]]  # names of the tensors of lora_A and lora_B
    rank: int | None  # to which all factors are padded; None: each keeps its own
    config: dict[str, Any]


def plan_adapter(
    shapes: Mapping[str, FactorShape],
    *,
    portable: bool = True,
    embeddings: str = EMBEDDINGS,
) -> AdapterLayout:
    """Return the layout of an adapter with these factors, see `save_peft`."""
    experts = [path for path, shape in shapes.items() if shape.num_experts is not None]
    names = name_experts(experts)
    keys = {}
    for path in shapes:
        is_embedding = path not in names and re.search(embeddings, path) is not None
        keys[path] = format_keys(names.get(path, path), is_embedding=is_embedding)

    rank = max(shape.rank for shape in shapes.values()) if portable else None
    ranks = {path: rank or shape.rank for path, shape in shapes.items()}
    config = make_config(ranks, parameters=experts)
    return AdapterLayout(dict(shapes), keys, rank, config)


def arrange_factors(
    layout: AdapterLayout, module: str, factors: Factors
) -> dict[str, np.ndarray]:
    """Return {name: array} of the two tensors of a module, padded to the rank."""
    u, v = (np.asarray(part) for part in factors)
    missing = 0 if layout.rank is None else layout.rank - u.shape[-1]
    if missing:
        batch = [(0, 0)] * (u.ndim - 2)
        u = np.pad(u, [*batch, (0, 0), (0, missing)])
        v = np.pad(v, [*batch, (0, missing), (0, 0)])
    a, b = join_experts(u, v) if u.ndim == 3 else (u.T, v.T)
    pair = map(np.ascontiguousarray, (a, b))
    return dict(zip(layout.keys[module], pair, strict=True))


def write_factors(
    file: BinaryIO,
    layout: AdapterLayout,
    read: Callable[[str], Factors],
    saved: Mapping[str, np.ndarray],
) -> None:
    """Write the tensors of an adapter, one module in memory at a time.

    Args:
        file: open for writing.
        layout: of the adapter.
        read: gives the factors of a module.
        saved: whole parameters to store beside them, by name; read when written.
    """
    entries = []
    for module in layout.shapes:
        entries += _list_entries(layout, module)
    for name, array in saved.items():
        code = find_code(np.dtype(array.dtype))
        entries.append((f"{PREFIX}{name}", code, tuple(array.shape), array.nbytes))
    file.write(format_header(entries))

    for module in layout.shapes:
        dtype = layout.shapes[module].dtype
        for array in arrange_factors(layout, module, read(module)).values():
            write_array(file, array.astype(dtype, copy=False))
    for array in saved.values():
        write_array(file, np.asarray(array))


def count_bytes(layout: AdapterLayout) -> int:
    """Return the bytes of the factors of an adapter."""
    return sum(
        entry[3] for module in layout.shapes for entry in _list_entries(layout, module)
    )


def _list_entries(
    layout: AdapterLayout, module: str
) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Return (name, code of the dtype, shape, bytes) of the two tensors of a module."""
    shape = layout.shapes[module]
    rank = (layout.rank or shape.rank) * (shape.num_experts or 1)
    sizes = ((rank, shape.num_inputs), (shape.num_outputs, rank))
    code = find_code(shape.dtype)
    return [
        (name, code, size, size[0] * size[1] * shape.dtype.itemsize)
        for name, size in zip(layout.keys[module], sizes, strict=True)
    ]
