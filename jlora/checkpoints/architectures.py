"""Names and layouts of the weights of model families.

Adapters name the modules of a model in memory; files may use other names. From
transformers 5 on the two differ for some families, whose experts are fused in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jlora.checkpoints.peft_config import check_pattern

# Whole models are wrapped in one of these, or are not: "model.layers.0..." is the
# "layers.0..." of a model without a head.
_WRAPPERS = ("model", "transformer", "bert", "roberta", "vit", "gpt_neox", "encoder")

# Tables of embeddings, stored as [vocabulary, size].
EMBEDDINGS = r"(^|\.)(embed_tokens|embed_in|wte|wpe|\w*embeddings?|shared)$"

# Matrices that are seldom adapted, beside embeddings: heads and routers.
NOT_TARGETS = r"(lm_head|embed_out|classifier|score|router|(^|\.)gate)(\.weight)?$"

Layouts = Mapping[str, str]  # {regular expression on a module or tensor: "io" or "oi"}


class Family(NamedTuple):
    """How a family of models stores its weights."""

    model_types: tuple[str, ...]  # of config.json; empty: all others
    inputs_first: str = r"(?!)"  # modules stored as [in, out]; (?!) matches none
    has_experts_io: bool = False  # whether experts are stored as [experts, in, out]
    # Module of the embedding, and of the head that uses the same weight if tied.
    tied: tuple[str, str] = ("embed_tokens", "lm_head")


_KERNEL = r"\.kernel(\.value)?$"  # of Flax
_CONV1D = r"\.(c_attn|c_proj|c_fc|q_attn)$"  # layers of the class Conv1D
_OTHERS = Family(())
FAMILIES = (
    Family(
        ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
        inputs_first=_CONV1D,
        tied=("wte", "lm_head"),
    ),
    Family(("gpt_oss",), has_experts_io=True),
    Family(("gpt_neox",), tied=("embed_in", "embed_out")),
    Family(("bert", "electra"), tied=("word_embeddings", "cls.predictions.decoder")),
    Family(("roberta", "xlm-roberta"), tied=("word_embeddings", "lm_head.decoder")),
    Family(("t5", "mt5", "umt5"), tied=("shared", "lm_head")),
)


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
    # Families whose files use these names; empty: no other family has them. BERT calls
    # its layers as ViT does, and keeps these names in memory.
    model_types: tuple[str, ...] = ()


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
        ("vit",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.k_proj$",
        (r"\1encoder.layer.\2.attention.attention.key.weight",),
        ("vit",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.v_proj$",
        (r"\1encoder.layer.\2.attention.attention.value.weight",),
        ("vit",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.attention\.o_proj$",
        (r"\1encoder.layer.\2.attention.output.dense.weight",),
        ("vit",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.mlp\.fc1$",
        (r"\1encoder.layer.\2.intermediate.dense.weight",),
        ("vit",),
    ),
    _Renaming(
        r"^(.*?)layers\.(\d+)\.mlp\.fc2$",
        (r"\1encoder.layer.\2.output.dense.weight",),
        ("vit",),
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


def find_module(tensor: str, model_type: str | None) -> str:
    """Return the path of the module whose weight, or part of it, a tensor holds.

    Args:
        tensor: its name. One of many experts gives the path of the stacked parameter.
        model_type: of config.json; None: unknown.
    """
    for row in RENAMED:
        if row.model_types and model_type not in row.model_types:
            continue
        for template in row.tensors:
            match = re.match(_make_pattern(template), tensor)
            if match is not None:
                return _fill_groups(row.module, match.groupdict())
    return tensor.removesuffix(".weight")


def is_one_expert(tensor: str) -> bool:
    """Return whether a tensor is one of many experts, which are fused in memory."""
    return re.search(r"\.experts\.\d+\.", tensor) is not None


def find_family(model_type: str | None) -> Family:
    """Return the row of the table for a `model_type` of config.json."""
    rows = (family for family in FAMILIES if model_type in family.model_types)
    return next(rows, _OTHERS)


def find_layout(module: str, model_type: str | None, layouts: Layouts) -> str | None:
    """Return "io" or "oi", as a module's matrices are stored; None: not known.

    Args:
        module: its path.
        model_type: of config.json; None: unknown.
        layouts: the user's own rows, which come first.
    """
    given = match_layout(module, layouts)
    if given is not None:
        return given
    family = find_family(model_type)
    patterns = (EMBEDDINGS, _KERNEL, family.inputs_first)
    return "io" if any(re.search(each, module) for each in patterns) else None


def match_layout(module: str, layouts: Layouts) -> str | None:
    """Return the layout of the user's first row that matches a module, or None."""
    for pattern, layout in layouts.items():
        if re.search(pattern, module) or re.search(pattern, f"{module}.weight"):
            return layout
    return None


def check_layouts(layouts: Layouts | None) -> dict[str, str]:
    """Return the checked {regular expression: layout}; None: none."""
    found = dict(layouts or {})
    for pattern, layout in found.items():
        check_pattern(pattern, "`layouts`")
        if layout not in ("io", "oi"):
            raise ValueError(
                f"`layouts` must give 'io' or 'oi', got {layout!r} for {pattern!r}. "
                "Write 'oi' for [outputs, inputs], as PyTorch stores its layers."
            )
    return found


def _make_pattern(template: str) -> str:
    r"""Return a regular expression for the names of a template with \1 and \2."""
    text = re.escape(template).replace(r"\\1", "(?P<first>.*?)")
    text = text.replace(r"\\2", r"(?P<second>\d+)")
    return f"^{text}$".replace(re.escape("{expert}"), r"\d+")


def _fill_groups(pattern: str, groups: Mapping[str, str]) -> str:
    """Return the path that a pattern of `RENAMED` stands for with these groups."""
    path = pattern.strip("^$").replace(r"\.", ".")
    for name in ("first", "second"):
        if name in groups:
            value = groups[name]
            path = re.sub(r"\([^()]*\)", lambda _, value=value: value, path, count=1)
    return path


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
