"""A byte-level transformer language model as a plain function of a tree of weights.

Every product with a weight goes through `jlora.linear`, so the same function runs on
the plain and on the adapted tree.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._types import AnyArray, Array, Float, Int, PRNGKey, Tree
from jlora.adaptation.adapted_weight import linear

NUM_BYTES = 256

Activations = Float[Array, "batch time width"]


class ModelSize(NamedTuple):
    """Sizes of the model."""

    width: int = 96
    num_layers: int = 2
    num_heads: int = 4
    context: int = 64  # bytes that the model sees


def init_model(size: ModelSize, *, key: PRNGKey) -> Tree:
    """Return the initial weights.

    The output of a weight has about variance one. Weights that end a residual branch
    are smaller, so that the sum of all branches has about variance one too.
    """
    keys = iter(jax.random.split(key, 3 + 4 * size.num_layers))

    def normal(rows: int, columns: int, std: float) -> Float[Array, "rows columns"]:
        shape = (rows, columns)
        return std * jax.random.normal(next(keys), shape, jnp.float32)

    def matrix(
        rows: int, columns: int, gain: float = 1.0
    ) -> Float[Array, "rows columns"]:
        return normal(rows, columns, gain / rows**0.5)

    d, branch_gain = size.width, (2 * size.num_layers) ** -0.5

    def layer() -> Tree:
        attention = {"qkv": matrix(d, 3 * d), "out": matrix(d, d, branch_gain)}
        mlp = {"up": matrix(d, 4 * d), "down": matrix(4 * d, d, branch_gain)}
        norms = jnp.ones((2, d), jnp.float32)
        return {"attention": attention, "mlp": mlp, "norms": norms}

    return {
        "embedding": normal(NUM_BYTES, d, 0.02),
        "positions": normal(size.context, d, 0.02),
        "layers": [layer() for _ in range(size.num_layers)],
        "norm": jnp.ones(d, jnp.float32),
        "head": matrix(d, NUM_BYTES, 0.5),
    }


def compute_logits(
    params: Tree, tokens: Int[AnyArray, "batch time"], num_heads: int
) -> Float[Array, "batch time 256"]:
    """Return the logits of the next byte after each position."""
    x = params["embedding"][tokens] + params["positions"][: tokens.shape[-1]][None]

    for layer in params["layers"]:
        attention_norm, mlp_norm = layer["norms"]
        attention, mlp = layer["attention"], layer["mlp"]
        x = x + _attend(attention, _normalize(x, attention_norm), num_heads)

        hidden = jax.nn.gelu(linear(_normalize(x, mlp_norm), mlp["up"]))
        x = x + linear(hidden, mlp["down"])
    return linear(_normalize(x, params["norm"]), params["head"])


def bits_per_byte(
    params: Tree, text: Int[AnyArray, "batch window"], num_heads: int
) -> Float[Array, ""]:
    """Return the mean cross-entropy in bits of each byte, given the bytes before it."""
    logits = compute_logits(params, text[:, :-1], num_heads)
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, text[:, 1:, None], axis=-1)
    return -jnp.mean(chosen) / jnp.log(2.0)


def _attend(weights: Tree, x: Activations, num_heads: int) -> Activations:
    batch, time, width = x.shape
    qkv = linear(x, weights["qkv"])
    qkv = qkv.reshape(batch, time, 3, num_heads, width // num_heads)
    query, key, value = (qkv[:, :, index] for index in range(3))
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return linear(mixed.reshape(batch, time, width), weights["out"])


def _normalize(x: Activations, gain: Float[Array, " width"]) -> Activations:
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * gain[None, None]
