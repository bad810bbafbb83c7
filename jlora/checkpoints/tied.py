"""Models whose head is their embedding: what an adapter changes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.checkpoints.architectures import find_family
from jlora.checkpoints.changes import Change
from jlora.checkpoints.checkpoint import Checkpoint

# Endings of the classes of models with a head over the vocabulary.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")
_WITH_HEAD_OF_DECODER = "ForConditionalGeneration"


class Untied(NamedTuple):
    """A head to write beside the embedding that it was."""

    head: str
    embedding: str  # the tensor whose values it takes
    change: Change | None


def untie(
    changes: Mapping[str, Change], checkpoint: Checkpoint, config: Mapping[str, Any]
) -> Untied | None:
    """Return the head to write apart, or None if the model need not be untied.

    A model without a tensor for its head uses its embedding. An adapter changes that
    embedding as a module, and the head keeps the old weight, so a merged file must hold
    both. New rows of tokens, though, and a replaced embedding hold for both uses.
    """
    given = config.get("architectures")
    names = [str(name) for name in given] if isinstance(given, list) else []
    embedding_module, head = find_family(config.get("model_type")).tied
    end = f"{embedding_module}.weight"
    embedding = next((name for name in checkpoint if name.endswith(end)), None)
    if embedding is None or not getattr(changes.get(embedding), "pairs", None):
        return None
    change = changes[embedding]
    if any(name.endswith(_WITH_HEAD_OF_DECODER) for name in names):
        raise ValueError(
            f"{checkpoint.path}: must not have an adapter of {embedding}, which "
            "encoder, decoder and head share, got one. Leave that module out."
        )
    has_own_head = any(name.endswith(f"{head}.weight") for name in checkpoint)
    if has_own_head or not any(name.endswith(_WITH_HEAD) for name in names):
        return None
    kept = Change([], rows=change.rows) if change.rows is not None else None
    return Untied(f"{head}.weight", embedding, kept)
