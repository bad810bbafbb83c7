"""The names of the tensors in a PEFT file."""

from __future__ import annotations

import re
from typing import NamedTuple

PREFIX = "base_model.model."

# The adapter's own name may stand after lora_A, as in "lora_A.default.weight".
_FACTOR = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(\.[^.]+)*$")
_TOKENS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta$")


class Key(NamedTuple):
    """The meaning of the name of a tensor."""

    module: str  # path in the model, without the prefix
    part: str  # "A", "B", "bias", "magnitude", "tokens", "base" or "saved"
    is_embedding: bool = False


def parse_key(name: str) -> Key:
    """Return what the name of a tensor says; of an unknown one that it is saved whole.

    The prefix is dropped. `base` is a copy of the weight of the base, which PEFT writes
    for embeddings that it adapts.
    """
    name = name.removeprefix(PREFIX)
    if found := _FACTOR.match(name):
        part = "bias" if found["end"] == ".bias" else found["side"]
        return Key(found["module"], part, found["embedding"] is not None)
    if found := _MAGNITUDE.match(name):
        return Key(found["module"], "magnitude")
    if found := _TOKENS.match(name):
        return Key(found["module"], "tokens")
    if name.endswith(".base_layer.weight"):
        return Key(name.removesuffix(".base_layer.weight"), "base")
    return Key(name.replace(".base_layer.", "."), "saved")


def format_keys(module: str, *, is_embedding: bool) -> tuple[str, str]:
    """Return the names of the two factors of a module."""
    if is_embedding:
        return tuple(f"{PREFIX}{module}.lora_embedding_{side}" for side in "AB")  # type: ignore[return-value]
    return tuple(f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")  # type: ignore[return-value]
