"""Sentences as the input of MiniLM's last layers, which both text tasks adapt."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models.minilm import (
    average_tokens,
    embed_tokens,
    find_minilm,
    load_minilm,
    run_layers,
    trace_layers,
)

# The layers below are frozen, so their output is computed once. All six would take
# three times as long; the last two hold a third of the weights of the layers.
NUM_ADAPTED = 2
PATTERN = "(attention|mlp)/.*/w$"
_CHUNK = 128  # sentences in one call


class Sentences(NamedTuple):
    """Output of the frozen layers for some sentences."""

    x: np.ndarray  # float32 [sentences, time, 384]
    mask: np.ndarray  # int32 [sentences, time], 1 for a token

    def take(self, indices: np.ndarray) -> "Sentences":
        """Return some of the sentences."""
        return Sentences(self.x[indices], self.mask[indices])


class Encoder(NamedTuple):
    """MiniLM in two parts."""

    frozen: Any  # tree: embeddings and the first layers
    layers: Any  # list of the last layers


def load_encoder() -> Encoder:
    """Return the pretrained `Encoder`."""
    params = load_minilm()
    first, last = params["layers"][:-NUM_ADAPTED], params["layers"][-NUM_ADAPTED:]
    return Encoder({**params, "layers": first}, last)


def run_frozen(encoder: Encoder, texts: list[str], length: int) -> Sentences:
    """Return the `Sentences` of texts; tokens after `length` are dropped."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(find_minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([each.ids for each in encoded], np.int32)
    mask = np.array([each.attention_mask for each in encoded], np.int32)
    return Sentences(map_chunks(_run_frozen, encoder.frozen, (ids, mask)), mask)


def embed(layers: Any, sentences: Sentences) -> jax.Array:
    """Return unit vectors [sentences, 384], of plain or adapted layers."""
    x, mask = sentences
    return average_tokens(run_layers(layers, x, mask), mask)


def embed_all(layers: Any, sentences: Sentences) -> np.ndarray:
    """Return the same for any number of sentences, some at a time."""
    return map_chunks(_embed, layers, tuple(sentences))


def map_chunks(fn: Any, params: Any, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return fn(params, *arrays) over the first axis, in chunks of one shape."""
    results = []
    for start in range(0, len(arrays[0]), _CHUNK):
        chunk = [array[start : start + _CHUNK] for array in arrays]
        count = len(chunk[0])
        padded = [np.resize(each, (_CHUNK, *each.shape[1:])) for each in chunk]
        results.append(np.asarray(fn(params, *padded))[:count])
    return np.concatenate(results)


def measure_moments(layers: Any, sentences: Sentences) -> Any:
    """Return the second moments xᵀx [m, m] of the inputs x of all matrices.

    Args:
        layers: plain layers.
        sentences: that are read; their padding is left out.

    Returns:
        Tree like `layers`, with the moments in the places of the matrices.
    """
    return _measure_moments(layers, *sentences)


@jax.jit
def _run_frozen(frozen, ids, mask):
    return run_layers(frozen["layers"], embed_tokens(frozen["embeddings"], ids), mask)


@jax.jit
def _measure_moments(layers, x, mask):
    _, inputs = trace_layers(layers, x, mask)
    is_token = mask.astype(x.dtype)[..., None]
    return jax.tree.map(
        lambda each: jnp.einsum("btm,btn->mn", is_token * each, each), inputs
    )


@jax.jit
def _embed(layers, x, mask):
    return embed(layers, Sentences(x, mask))
