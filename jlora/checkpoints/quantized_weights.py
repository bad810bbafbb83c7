"""`load_weights`: the weights of a checkpoint, quantised ones without a float copy."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._types import DTypeLike
from jlora.checkpoints import bitsandbytes_files, quantized_files
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.folders import read_model_config
from jlora.quantization.formats import fp8
from jlora.quantization.quantized_array import QuantizedArray


def load_weights(
    path: str | os.PathLike[str], *, dtype: DTypeLike | None = None
) -> dict[str, np.ndarray | QuantizedArray]:
    """Return the weights of a checkpoint by name, quantised ones as `QuantizedArray`.

    The codes are taken as stored, so that no float copy of a quantised weight is made.
    Read are:

    - arrays that `save_arrays` and `jlora init --quantize` wrote, in every format;
    - NF4 (plain or double quantised) and int8 of transformers with bitsandbytes;
    - fp8 (e4m3) with scales, as of DeepSeek and compressed-tensors.

    They are matrices [outputs, inputs], for rules with layout="oi". The tensors of
    their scales are not listed.

    Args:
        path: see `open_checkpoint`.
        dtype: that int8 and fp8 weights stand for: float32, bfloat16 or float16; NF4
            names its own. None: the one of config.json, or bfloat16.

    Returns:
        {name: NumPy array or `QuantizedArray`} in the order of the files.

    Raises:
        OSError, ValueError: as `open_checkpoint`; FP4, e5m2, other levels than NF4's,
            codes and scales of different sizes.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> w = jlora.quantization.quantize(jnp.ones((128, 4)), "nf4")
        >>> jlora.save_arrays(f"{folder.name}/w.safetensors", {"w": w})
        >>> jlora.checkpoints.load_weights(folder.name)["w"]
        QuantizedArray(float32[128,4], nf4, 4.25 bits)
        >>> folder.cleanup()
    """
    checkpoint = open_checkpoint(path)
    readers: dict[str, Any] = {}
    parts: set[str] = set()
    standing = _find_dtype(checkpoint, dtype)
    for name in checkpoint:
        found = _find_reader(checkpoint, name, standing)
        if found is not None:
            readers[name], own = found
            parts.update(own)
    return {
        name: readers[name]() if name in readers else checkpoint[name]
        for name in checkpoint
        if name not in parts
    }


def _find_reader(checkpoint: Checkpoint, name: str, dtype: str) -> Any:
    """Return (function that reads a quantised weight, its other tensors), or None."""
    file = checkpoint.info(name).file
    if f"{name}{quantized_files.STATE}" in checkpoint:
        parts = quantized_files.find_parts(name, checkpoint)
        read = functools.partial(quantized_files.join_tensors, name, checkpoint, file)
        return read, parts

    kind = bitsandbytes_files.find_kind(name, checkpoint)
    if kind is not None:
        parts = bitsandbytes_files.find_parts(name, kind, checkpoint)
        read = functools.partial(
            bitsandbytes_files.read_weight,
            name,
            kind,
            checkpoint.__getitem__,
            dtype,
            file,
        )
        return read, parts

    if name in checkpoint.scales:
        read = functools.partial(_read_fp8, checkpoint, name, dtype)
        return read, [checkpoint.scales[name]]
    return None


def _find_dtype(checkpoint: Checkpoint, dtype: DTypeLike | None) -> str:
    """Return the dtype that weights stand for whose files do not say it."""
    if dtype is None:
        config = read_model_config(checkpoint.path)
        named = str(config.get("dtype") or config.get("torch_dtype"))
        return named if named in quantized_files.DTYPES else "bfloat16"
    name = jnp.dtype(dtype).name
    if name not in quantized_files.DTYPES:
        raise TypeError(
            f"`dtype` must be float32, bfloat16 or float16, got {name}. Choose one of "
            "them."
        )
    return name


def _read_fp8(checkpoint: Checkpoint, name: str, dtype: str) -> QuantizedArray:
    """Return a weight in e4m3, with a scale for each block of inputs of each output."""
    info = checkpoint.info(name)
    if info.dtype != "float8_e4m3fn":
        raise ValueError(
            f"{info.file}: {name} must be in e4m3 to stay in 8 bits, got {info.dtype}. "
            "Read it with `open_checkpoint(path).read_dequantized`."
        )
    scale = checkpoint.read_scale(name)
    values = np.asarray(scale.values, np.float32)
    for axis in range(len(info.shape) - 1):
        owners = np.arange(info.shape[axis]) // scale.block[axis]
        values = np.take(values, owners, axis) if values.shape[axis] > 1 else values
    values = np.broadcast_to(values, (*info.shape[:-1], values.shape[-1]))

    num_inputs, block_size = info.shape[-1], scale.block[-1]
    format = fp8(block_size=None if block_size >= num_inputs else block_size)
    codes = jnp.asarray(checkpoint[name].view(np.uint8))
    standing = np.dtype(jnp.dtype(dtype))
    array = QuantizedArray(
        codes, jnp.asarray(values), None, format, standing, "oi", info.shape[-2:]
    )
    quantized_files.check_sizes(array, info.file, name)
    return array
