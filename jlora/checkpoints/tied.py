"""Models whose head is their embedding: what an adapter changes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora.checkpoints.changes import Change
from jlora.checkpoints.checkpoint import Checkpoint

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel")


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
    names = config.get("architectures") or [""]
    has_head = any(str(name).endswith(_WITH_HEAD) for name in names)
    if not has_head or any(name.endswith(_HEAD) for name in checkpoint):
        return None
    embedding = next((name for name in checkpoint if name.endswith(_EMBEDDINGS)), None)
    if embedding is None or embedding not in changes:
        return None
    change = changes[embedding]
    if not change.pairs:
        return None
    kept = Change([], rows=change.rows) if change.rows is not None else None
    return Untied(_HEAD, embedding, kept)
