"""`save_peft` and `load_peft`: factors ↔ the files that PEFT reads and writes."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora import _checks
from jlora.checkpoints.adapter_files import write_adapter
from jlora.checkpoints.adapter_layout import FactorShape, plan_adapter
from jlora.checkpoints.architectures import EMBEDDINGS
from jlora.checkpoints.host_arrays import write_together
from jlora.checkpoints.peft_file import (
    check_finite,
    check_only_factors,
    make_pair,
    open_peft,
)
from jlora.checkpoints.safetensors import check_entries
from jlora.factors import Factors


def save_peft(
    folder: str | os.PathLike[str],
    factors: Mapping[str, Factors],
    *,
    scale: float | Mapping[str, float] = 1.0,
    portable: bool = True,
    embeddings: str = EMBEDDINGS,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write factors as an adapter that PEFT, vLLM and llama.cpp load.

    The folder gets `adapter_model.safetensors` and `adapter_config.json`. The scale is
    multiplied into the factors, √|scale| on each side, and the configuration says that
    it is 1.

    Factors may be sharded. If some lie on devices of several processes, all processes
    have to call this with the same factors, as `save_arrays` says. The factors of one
    module are on the host at a time.

    Args:
        folder: to write to; made if it does not exist. Files of an earlier adapter in
            it are replaced.
        factors: {path of a module in the PyTorch model: `Factors` of u [in, r],
            v [r, out]}, ranks may differ. For experts, {path of the parameter: u
            [experts, in, r], v [experts, r, out]}. A last ".weight" is dropped.
        scale: of all deltas, or {path: scale}.
        portable: pad all factors with zeros to one rank, which every reader
            understands. False: keep the ranks, in a `rank_pattern`, which vLLM before
            2026 and llama.cpp read wrongly.
        embeddings: regular expression, searched in the paths, of the modules that are
            tables of embeddings: PEFT stores these under other names.
        config: more entries for the configuration, such as
            {"base_model_name_or_path": "org/name", "task_type": "CAUSAL_LM"}.

    Raises:
        OSError: the folder cannot be written.
        TypeError: factors of the wrong kind.
        ValueError: no factors, a path that is none of a module, NaN or Inf, shapes that
            do not fit, a scale for no path.

    Accuracy: exact in the dtype of the factors for a scale of 1; float64 is rounded to
        float32.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> delta = jlora.Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> jlora.save_peft(folder.name, {"model.layers.0.mlp.up_proj": delta})
        >>> factors, config = jlora.load_peft(folder.name)
        >>> factors["model.layers.0.mlp.up_proj"].u.shape, config["r"]
        ((4, 2), 2)
        >>> folder.cleanup()
    """
    checked = _check_modules(factors)
    scales = _list_scales(scale, checked)
    shapes = {path: _describe(pair) for path, pair in checked.items()}
    layout = plan_adapter(shapes, portable=portable, embeddings=embeddings)
    # Wide dtypes first: every tensor begins at a multiple of the size of its items.
    ordered = sorted(layout.shapes.items(), key=lambda item: -item[1].dtype.itemsize)
    layout = layout._replace(shapes=dict(ordered))
    arrays = {
        f"{path}.{side}": part
        for path in layout.shapes
        for side, part in zip("uv", checked[path], strict=True)
    }

    check_entries(folder, arrays)

    def write(values: Iterator[np.ndarray]) -> None:
        def read(path: str) -> Factors:
            return _fold(path, next(values), next(values), scales[path])

        write_adapter(pathlib.Path(folder), layout, read, config or {})

    write_together(folder, arrays, write)


def _describe(pair: Factors) -> FactorShape:
    u, v = pair
    num_experts = u.shape[0] if u.ndim == 3 else None
    dtype = np.dtype(np.float32 if u.dtype == np.float64 else u.dtype)
    return FactorShape(u.shape[-2], v.shape[-1], u.shape[-1], num_experts, dtype)


def load_peft(
    folder: str | os.PathLike[str],
) -> tuple[dict[str, Factors], dict[str, Any]]:
    """Return the factors of a PEFT adapter by module, and its configuration.

    The scale, alpha / r of each module by PEFT's rules, is multiplied into v.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        ({path of a module: `Factors` of u [in, r], v [r, out]}, configuration); experts
        have u [experts, in, r], v [experts, r, out]. NumPy arrays in the stored dtype,
        v in at least float32 unless its scale is 1.

    Raises:
        OSError: a file is missing.
        ValueError: a damaged file, another kind of adapter, a factor without the
            other, a rank that disagrees with the configuration, NaN or Inf, or parts
            that are no factors: DoRA magnitudes, biases, whole modules, token rows.
            `jlora.checkpoints.read_peft` returns those too.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> delta = jlora.Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> jlora.save_peft(folder.name, {"layers.0.up_proj": delta}, scale=0.5)
        >>> u, v = jlora.load_peft(folder.name)[0]["layers.0.up_proj"]
        >>> (u @ v).shape
        (4, 3)
        >>> folder.cleanup()
    """
    file = open_peft(folder)
    check_only_factors(file)
    return {path: file.read(path) for path in file.modules}, file.config


def _check_modules(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return {module path: factors} of arrays that fit together."""
    checked: dict[str, Factors] = {}
    for path, pair in factors.items():
        module = path.removesuffix(".weight") if isinstance(path, str) else ""
        if not module or not re.fullmatch(r"[\w.\-]+", module) or ".." in module:
            raise ValueError(
                "`factors` must be named by paths of modules such as "
                f"'model.layers.0.self_attn.q_proj', got {path!r}. Rename it."
            )
        if module in checked:
            raise ValueError(
                f"`factors` must name each module once, got {module!r} twice. "
                "Leave one out."
            )

        u, v = _checks.check_factors(pair)
        if u.ndim not in (2, 3) or 0 in u.shape or 0 in v.shape:
            raise ValueError(
                f"{module}: `factors` must be [in, r] and [r, out], or one of each for "
                f"every expert, got {u.shape} and {v.shape}. Split or reshape them."
            )
        checked[module] = Factors(u, v)
    if not checked:
        raise ValueError("`factors` must hold at least one pair, got none. Pass some.")
    return checked


def _list_scales(
    scale: float | Mapping[str, float], modules: Mapping[str, Any]
) -> dict[str, float]:
    if not isinstance(scale, Mapping):
        return dict.fromkeys(modules, check_scale(scale, "scale"))
    given = {path.removesuffix(".weight"): value for path, value in scale.items()}
    if given.keys() != modules.keys():
        odd = sorted(given.keys() ^ modules.keys())[0]
        raise ValueError(
            f"`scale` must have the paths of `factors`, got a difference at {odd!r}. "
            "Pass one number, or one for each."
        )
    return {path: check_scale(value, path) for path, value in given.items()}


def check_scale(value: Any, name: str) -> float:
    """Return a finite number as a float, or refuse another value."""
    number = float(_checks.check_scalar(value, name))
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite, got {number}. Pass another number.")
    return number


def _fold(path: str, u: np.ndarray, v: np.ndarray, scale: float) -> Factors:
    """Return finite factors with √|scale| in each, of at most 32 bits."""
    for name, part in (("u", u), ("v", v)):
        check_finite(part, f"{path}.{name}", "`factors`")
    root = math.sqrt(abs(scale))
    if scale != 1.0:
        u, v = u * u.dtype.type(root), v * v.dtype.type(math.copysign(root, scale))
    if u.dtype == np.float64:
        u, v = u.astype(np.float32), v.astype(np.float32)
    return make_pair(u, v)
