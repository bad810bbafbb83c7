"""`load_adapter`: factors of adapters in the formats of several programs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jlora.checkpoints.adapter_names import pair_names, parse_names
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.diffusers_scales import METADATA_KEY, read_scales
from jlora.checkpoints.kohya_modules import match_modules
from jlora.checkpoints.peft import check_scale, load_peft
from jlora.checkpoints.peft_config import CONFIG_NAME
from jlora.checkpoints.peft_file import make_pair, read_finite
from jlora.checkpoints.qwix_factors import merge_axes
from jlora.checkpoints.safetensors_header import read_header
from jlora.factors import Factors


def load_adapter(
    path: str | os.PathLike[str],
    *,
    scale: float | None = None,
    modules: Iterable[str] | None = None,
) -> dict[str, Factors]:
    """Return the factors of a LoRA adapter of PEFT, kohya, diffusers or qwix.

    The names of the tensors decide which format it is:

    - PEFT: a folder with `adapter_config.json`; as `load_peft` reads it.
    - kohya: "lora_unet_<module>.lora_down.weight", also lora_transformer_, lora_te_,
      lora_te1_, lora_te2_ and lora_te3_. The scale is alpha / r.
    - diffusers: "unet.<module>.lora_A.weight", also transformer, text_encoder and
      text_encoder_2, and the older ".lora.down.weight". The scale is in the metadata
      or in ".alpha". The paths keep "unet.".
    - qwix, tunix: "<module>.kernel_lora_a", keys joined with "." or "/". The path is
      the weight's, such as "layers.0.kernel". Further axes of an Einsum are merged;
      the layers of a scanned model are a stack.

    Args:
        path: a .safetensors file, a folder with one, or an .npz file.
        scale: alpha / rank of the training, which qwix does not store. None: the scale
            in the file. In a file of kohya or diffusers that says none it is 1.
        modules: paths of the model's modules, or names of its tensors, such as an open
            checkpoint. kohya's files write "_" for each "." of a path, and only the
            modules tell which is which. For a pipeline put "unet.", "transformer.",
            "text_encoder." or "text_encoder_2." in front of the paths. The paths of
            the result are the given ones, without ".weight". None: the names in the
            file.

    Returns:
        {path of a module: `Factors` of u [in, r], v [r, out]}, with the scale
        multiplied into v: u @ v is the delta. Stacks have u [layers, in, r],
        v [layers, r, out]. NumPy arrays in the stored dtype, v in at least float32
        unless its scale is 1. A 1 x 1 convolution is a matrix.

    Raises:
        OSError: the file cannot be opened.
        TypeError: `scale` is no number, `modules` are no strings.
        ValueError: a damaged or pickled file, two formats in one, a tensor that is no
            factor (LoHa, LoKr, DoRA, biases, unknown names), a factor without the
            other, shapes that do not fit, larger convolutions, NaN or Inf; a scale
            that is missing or said twice; a name that fits no module, or several.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = f"{folder.name}/style.safetensors"
        >>> name = "lora_unet_mid_block_to_q"
        >>> down, up, alpha = np.ones((2, 4)), np.ones((3, 2)), np.array(1.0)
        >>> tensors = {f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}
        >>> jlora.save_arrays(file, tensors | {f"{name}.lora_up.weight": up})
        >>> factors = jlora.checkpoints.load_adapter(file, modules=["mid_block.to_q"])
        >>> factors["mid_block.to_q"].u.shape, factors["mid_block.to_q"].v.tolist()
        ((4, 2), [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
        >>> folder.cleanup()
    """
    path = pathlib.Path(path)
    if (path / CONFIG_NAME).exists():
        _refuse_given(path, "PEFT", scale=scale, modules=modules)
        return load_peft(path)[0]

    arrays = open_checkpoint(path)
    keys = parse_names(path, arrays)
    pairs = pair_names(path, keys)
    kind = next(iter(keys.values())).format
    if kind != "kohya":
        _refuse_given(path, kind, modules=modules)
    if kind == "qwix":
        return _read_qwix(path, arrays, pairs, scale)

    factors = _read_pytorch(path, arrays, pairs, scale, kind)
    if modules is None:
        return factors
    paths = match_modules(path, factors, modules)
    return {paths[name]: pair for name, pair in factors.items()}


def _refuse_given(path: pathlib.Path, kind: str, **arguments: Any) -> None:
    """Refuse arguments whose answer is in the file."""
    reasons = {"scale": "say the scale", "modules": "name the modules in full"}
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{path}: `{name}` must be None for an adapter of {kind}, whose files "
                f"{reasons[name]}, got {type(value).__name__}. Leave it out."
            )


def _read_qwix(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    pairs: Mapping[str, Mapping[str, str]],
    scale: float | None,
) -> dict[str, Factors]:
    if scale is None:
        raise ValueError(
            f"{path}: `scale` must be alpha / rank of the training for an adapter of "
            "qwix, whose files do not say it, got None. Pass the number."
        )
    scale = check_scale(scale, "scale")
    factors: dict[str, Factors] = {}
    for module, parts in pairs.items():
        a, b = (read_finite(arrays, parts[part], path) for part in ("down", "up"))
        factors[module] = merge_axes(path, module, a, b, scale)
    return factors


def _read_pytorch(
    path: pathlib.Path,
    arrays: Mapping[str, np.ndarray],
    pairs: Mapping[str, Mapping[str, str]],
    scale: float | None,
    kind: str,
) -> dict[str, Factors]:
    """Return the factors of a file with down [r, in] and up [out, r]."""
    matrices = {
        module: _read_matrices(path, arrays, parts) for module, parts in pairs.items()
    }
    ranks = {module: down.shape[0] for module, (down, _) in matrices.items()}
    stated = {
        module: _read_alpha(path, arrays, parts["alpha"]) / ranks[module]
        for module, parts in pairs.items()
        if "alpha" in parts
    }
    if kind == "diffusers":
        settings = read_scales(path, _read_metadata(arrays), ranks)
        if stated and settings:
            raise ValueError(
                f"{path}: must say the scale once, got {METADATA_KEY} and "
                f"{pairs[next(iter(stated))]['alpha']}. Remove one of them."
            )
        stated |= settings

    if stated:
        _refuse_given(path, kind, scale=scale)
    other = 1.0 if scale is None else check_scale(scale, "scale")
    return {
        module: make_pair(down.T, up.T, scale=stated.get(module, other))
        for module, (down, up) in matrices.items()
    }


def _read_matrices(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], parts: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return down [r, in] and up [out, r]."""
    down, up = (_read_matrix(path, arrays, parts[part]) for part in ("down", "up"))
    if down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{path}: must hold factors of one rank, got {down.shape} at "
            f"{parts['down']} and {up.shape} at {parts['up']}. Save the adapter again."
        )
    return down, up


def _read_matrix(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], name: str
) -> np.ndarray:
    """Return a matrix, or a 1 x 1 convolution as one."""
    array = read_finite(arrays, name, path)
    if array.ndim < 2 or any(size != 1 for size in array.shape[2:]):
        raise ValueError(
            f"{path}: must hold matrices or 1 x 1 convolutions, got shape "
            f"{array.shape} at {name}. Leave the layer out."
        )
    return array.reshape(array.shape[:2])


def _read_alpha(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], name: str
) -> float:
    array = np.asarray(arrays[name])
    number = float(array.astype(np.float64).item()) if array.size == 1 else np.nan
    # kohya itself reads 0 as the rank, other programs as no delta.
    if not np.isfinite(number) or number == 0:
        raise ValueError(
            f"{path}: must hold one finite number other than 0 as alpha, got "
            f"{array.tolist()} at {name}. Write the number of the training run."
        )
    return number


def _read_metadata(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    files = arrays.files if isinstance(arrays, Checkpoint) else ()
    metadata: dict[str, str] = {}
    for file in files:
        metadata |= read_header(file).metadata
    return metadata
