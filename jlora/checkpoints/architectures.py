"""What model families call their weights, and how they store them.

Adapters name the modules of a model in memory; files may use other names. From
transformers 5 on the two differ for some families, whose experts are fused in memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

# Whole models are wrapped in one of these, or are not: "model.layers.0..." is the
# "layers.0..." of a model without a head.
_WRAPPERS = ("model", "transformer", "bert", "roberta", "vit", "gpt_neox", "encoder")

# Tables of embeddings, stored as [vocabulary, size].
EMBEDDINGS = r"(^|\.)(embed_tokens|embed_in|wte|wpe|\w*embeddings?|shared)$"

# Layers of the class Conv1D, stored as [in, out], by the `model_type` of config.json.
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")

# Experts stored as [experts, in, out], gate and up interleaved.
_EXPERTS_IO_FAMILIES = ("gpt_oss",)


class Slice(NamedTuple):
    """A part of the factors of a module that belongs to one tensor of a file."""

    tensor: str
    expert: int | None = None  # entry of the factors' batch axis
    # Outputs as (part, number of equal parts).
    outputs: tuple[int, int] = (0, 1)


class _Renaming(NamedTuple):
    """How a module of transformers 5 is found in a file."""

    module: str  # regular expression on its path
    tensors: tuple[str, ...]  # names in the file; {expert} stands for a number


# One row for each difference: path in memory -> names in the file.
RENAMED = (
    # Mixtral: w1 is the gate, w3 goes up, w2 goes down.
    _Renaming(
        r"^(.*)\.mlp\.experts\.gate_up_proj$",
        (
            r"\1.block_sparse_moe.experts.{expert}.w1.weight",
            r"\1.block_sparse_moe.experts.{expert}.w3.weight",
        ),
    ),
    _Renaming(
        r"^(.*)\.mlp\.experts\.down_proj$",
        (r"\1.block_sparse_moe.experts.{expert}.w2.weight",),
    ),
    _Renaming(r"^(.*)\.mlp\.gate$", (r"\1.block_sparse_moe.gate.weight",)),
    # Qwen2 and Qwen3 with experts.
    _Renaming(
        r"^(.*)\.mlp\.experts\.gate_up_proj$",
        (
            r"\1.mlp.experts.{expert}.gate_proj.weight",
            r"\1.mlp.experts.{expert}.up_proj.weight",
        ),
    ),
    _Renaming(
        r"^(.*)\.mlp\.experts\.down_proj$",
        (r"\1.mlp.experts.{expert}.down_proj.weight",),
    ),
    _Renaming(r"^lm_head$", (r"embed_out.weight",)),  # GPT-NeoX
    # ViT.
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.q_proj$",
        (r"\1encoder.layer.\2.attention.attention.query.weight",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.k_proj$",
        (r"\1encoder.layer.\2.attention.attention.key.weight",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.v_proj$",
        (r"\1encoder.layer.\2.attention.attention.value.weight",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.o_proj$",
        (r"\1encoder.layer.\2.attention.output.dense.weight",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.mlp\.fc1$",
        (r"\1encoder.layer.\2.intermediate.dense.weight",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.mlp\.fc2$",
        (r"\1encoder.layer.\2.output.dense.weight",),
    ),
)


def find_tensors(
    module: str, names: set[str], num_experts: int | None
) -> list[Slice] | None:
    """Return the tensors of a file that make up the weight of a module.

    Args:
        module: its path in the model, or the path of a parameter.
        names: of the file's tensors.
        num_experts: of stacked experts; None: a single matrix.

    Returns:
        One `Slice`, or several for fused experts; None: no tensor fits.
    """
    for own in _list_variants(module):
        for name in (f"{own}.weight", own):
            if name in names:
                return [Slice(name)]
        for row in RENAMED:
            found = _rename(row, own, names, num_experts)
            if found:
                return found
    return None


def find_module(tensor: str) -> str:
    """Return the path of the module whose weight a tensor of a file is.

    Args:
        tensor: its name, of a single matrix.
    """
    for row in RENAMED:
        if len(row.tensors) != 1 or "{" in row.tensors[0]:
            continue
        match = re.match(_make_pattern(row.tensors[0]), tensor)
        if match is not None:
            return _fill_groups(row.module, match.groups())
    return tensor.removesuffix(".weight")


def is_one_expert(tensor: str) -> bool:
    """Return whether a tensor is one of many experts, which are fused in memory."""
    return re.search(r"\.experts\.\d+\.", tensor) is not None


def _make_pattern(template: str) -> str:
    r"""Return a regular expression for the names of a template with \1 and \2."""
    text = re.escape(template).replace(r"\\1", "(.*?)").replace(r"\\2", r"(\d+)")
    return f"^{text}$"


def _fill_groups(pattern: str, values: Sequence[str]) -> str:
    """Return the path that a pattern of `RENAMED` stands for with these groups."""
    path = pattern.strip("^$").replace(r"\.", ".")
    for value in values:
        path = re.sub(r"\([^()]*\)", lambda _, value=value: value, path, count=1)
    return path


def is_conv1d(module: str, model_type: str | None) -> bool:
    """Return whether a module is stored as [in, out], as GPT-2's layers are."""
    return model_type in _CONV1D_FAMILIES and _CONV1D.search(module) is not None


def is_inputs_first(module: str, model_type: str | None) -> bool:
    """Return whether a matrix is stored as [in, out].

    Conv1D layers and embeddings are, and the kernels of Flax.
    """
    is_embedding = re.search(EMBEDDINGS, module) is not None
    is_kernel = re.search(r"\.kernel(\.value)?$", module) is not None
    return is_embedding or is_kernel or is_conv1d(module, model_type)


def has_experts_io(model_type: str | None) -> bool:
    """Return whether a family stores its experts as [experts, in, out]."""
    return model_type in _EXPERTS_IO_FAMILIES


def _list_variants(module: str) -> list[str]:
    """Return the path, and the path without or with the name of a whole model."""
    first, _, rest = module.partition(".")
    shorter = [rest] if first in _WRAPPERS and rest else []
    return [module, *shorter, *(f"{wrapper}.{module}" for wrapper in _WRAPPERS)]


def _rename(
    row: _Renaming, module: str, names: set[str], num_experts: int | None
) -> list[Slice] | None:
    match = re.match(row.module, module)
    if match is None:
        return None
    templates = [match.expand(tensor) for tensor in row.tensors]
    experts = [None] if num_experts is None else list(range(num_experts))
    found = [
        Slice(template.format(expert=expert), expert, (part, len(templates)))
        for expert in experts
        for part, template in enumerate(templates)
    ]
    return found if all(piece.tensor in names for piece in found) else None
