"""A checkpoint whose adapted weights are stored in a format of few bits."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.checkpoints import bitsandbytes_files, quantized_files
from jlora.checkpoints.changes import Change
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.folders import read_model_config
from jlora.checkpoints.json_files import write_json
from jlora.checkpoints.lazy_tensors import LazyTensor
from jlora.checkpoints.merge_plan import OutputTensor, make_side_file, plan_files
from jlora.checkpoints.modules import MatrixRef, StoredModule
from jlora.checkpoints.safetensors import find_code
from jlora.checkpoints.window_store import WindowStore
from jlora.quantization.base import Format
from jlora.quantization.quantized_array import QuantizedArray

_BASE = "/base/"  # between the name of a matrix and of its tensor


def check_quantizable(modules: Iterable[StoredModule], format: Format | None) -> None:
    """Refuse weights whose base cannot be stored in a format."""
    if format is None:
        return
    for module in modules:
        if module.num_experts is not None or len(module.pieces) != 1:
            raise ValueError(
                f"{module.path}: `quantize` must be None for stacked experts, got "
                f"{format.label}. Leave them out of `targets`."
            )
        if module.dtype == "float64":
            raise ValueError(
                f"{module.path}: must be float32, bfloat16 or float16 to be quantised, "
                "got float64. Cast the model first."
            )


def list_base_tensors(
    ref: MatrixRef, base: QuantizedArray, *, is_foreign: bool
) -> dict[str, np.ndarray]:
    """Return {name in the store: tensor} of a quantised base.

    Args:
        ref: the matrix.
        base: its base.
        is_foreign: whether the names are the ones of bitsandbytes.
    """
    name = ref.module.pieces[0].tensor
    scheme = bitsandbytes_files if is_foreign else quantized_files
    tensors = scheme.list_tensors(name, base)
    return {
        f"{ref.name}{_BASE}{key}": np.asarray(tensor) for key, tensor in tensors.items()
    }


def can_be_foreign(modules: Iterable[StoredModule], format: Format) -> bool:
    """Return whether bitsandbytes can hold the bases of all modules."""
    return all(
        bitsandbytes_files.why_not_writable(format, module.layout, module.shape[0])
        is None
        for module in modules
    )


def plan_quantized_files(
    source: Checkpoint,
    modules: Sequence[StoredModule],
    store: WindowStore,
    format: Format,
) -> dict[pathlib.Path, list[OutputTensor]]:
    """Return the tensors of each file: those of a base in the place of its weight."""
    owners = {module.pieces[0].tensor: MatrixRef(module, 0) for module in modules}
    files: dict[pathlib.Path, list[OutputTensor]] = {}
    for path, plan in plan_files(source, {}, None).items():
        files[path] = []
        for tensor in plan:
            ref = owners.get(tensor.name)
            new = [tensor] if ref is None else _list_new_tensors(ref, store)
            files[path] += new
    return files


def make_quantized_side_file(
    source: Checkpoint,
    path: pathlib.Path,
    plans: Mapping[pathlib.Path, Sequence[OutputTensor]],
    modules: Sequence[StoredModule],
    format: Format,
) -> Callable[[Any], Any]:
    """Return the function that writes a side file, config.json with the format."""
    config = read_model_config(source.path)
    if path.name == "config.json" and can_be_foreign(modules, format):
        quantized = {module.pieces[0].tensor for module in modules}
        settings = _make_config(source, quantized, format)
        return functools.partial(
            write_json, content={**config, "quantization_config": settings}
        )
    num_bytes = sum(tensor.num_bytes for plan in plans.values() for tensor in plan)
    return make_side_file(path, plans, config, num_bytes, is_untied=False)


def _list_new_tensors(ref: MatrixRef, store: WindowStore) -> list[OutputTensor]:
    window, prefix = store.open_window(ref), f"{ref.name}{_BASE}"
    tensors = []
    for name in (name for name in window if name.startswith(prefix)):
        value = LazyTensor(window, name)
        tensors.append(
            OutputTensor(
                name.removeprefix(prefix),
                find_code(value.dtype),
                value.shape,
                value.nbytes,
                None,
                Change([], value=value),
            )
        )
    return tensors


def _make_config(
    source: Checkpoint, quantized: set[str], format: Format
) -> dict[str, Any]:
    """Return the settings with which transformers loads the base."""
    is_nf4 = format.name == "nf4"
    settings: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": is_nf4,
        "load_in_8bit": not is_nf4,
        "llm_int8_skip_modules": [
            name.removesuffix(".weight")
            for name in source
            if name.endswith(".weight")
            and name not in quantized
            and len(source.info(name).shape) == 2
        ],
    }
    if is_nf4:
        settings |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": getattr(format, "double_quant", False),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    return settings
