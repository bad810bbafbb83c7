"""The modules that the flattened names of kohya's files stand for."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

# Prefixes that may stand in front of a module's path: the part of a diffusers
# pipeline, or the place of the network in a single file of Stable Diffusion.
_COMPONENTS = {
    "unet": ("unet", "transformer", "model_diffusion_model"),
    "transformer": ("transformer",),
    "te": ("text_encoder",),
    "te1": ("text_encoder",),
    "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3", "text_encoder_2"),  # T5; Flux has no third one
}


def match_modules(
    path: pathlib.Path, names: Iterable[str], modules: Iterable[str]
) -> dict[str, str]:
    """Return {name in the file: path of the module}.

    Args:
        path: of the file, named in errors.
        names: such as "lora_unet_down_blocks_0_proj_in".
        modules: paths of modules, or names of their weights.

    Raises:
        TypeError: `modules` is one string, or holds other values than strings.
        ValueError: a name that no module fits, or several; two names of one module.
    """
    flattened = _flatten(modules)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in names:
        module = _match(path, name, flattened)
        if module in owners:
            raise ValueError(
                f"{path}: `modules` must tell the parts of the model apart, got "
                f"{module} for {owners[module]} and {name}. Put 'unet.', "
                "'text_encoder.' or 'text_encoder_2.' in front of the paths."
            )
        owners[module] = name
        found[name] = module
    return found


def _match(path: pathlib.Path, name: str, flattened: dict[str, set[str]]) -> str:
    """Return the one module that a name stands for."""
    _, part, end = name.split("_", 2)
    candidates = [end, *(f"{component}_{end}" for component in _COMPONENTS[part])]
    fitting = sorted(set().union(*(flattened.get(flat, ()) for flat in candidates)))

    if not fitting:
        raise ValueError(
            f"{path}: `modules` must hold a module for each factor, got none for "
            f"{name}. Pass the modules of the model that was adapted."
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{path}: `modules` must hold one module for {name}, got "
            f"{' and '.join(fitting)}. Leave out the others."
        )
    return fitting[0]


def _flatten(modules: Iterable[str]) -> dict[str, set[str]]:
    """Return {path with _ for each dot: the modules of this name}."""
    if isinstance(modules, str):
        raise TypeError(
            f"`modules` must be several paths, got the string {modules!r}. Put it in "
            "a list."
        )
    flattened: dict[str, set[str]] = {}
    for module in modules:
        if not isinstance(module, str):
            raise TypeError(
                f"`modules` must hold paths that are strings, got {module!r}. Join its "
                "keys with dots."
            )
        module = module.removesuffix(".weight")
        flattened.setdefault(module.replace(".", "_"), set()).add(module)
    return flattened
