"""A byte-level transformer language model as a plain function of a tree of weights.

Every matrix product with a weight goes through `jlora.linear`, so the same function runs on the
plain and on the adapted tree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.adaptation.adapted_weight import linear

NUM_BYTES = 256


class ModelSize(NamedTuple):
    width: int = 96
    num_layers: int = 2
    num_heads: int = 4
    context: int = 64


def init_model(size, *, key):
    """Return the tree of weights; products have variance one, residual branches less."""
    keys = iter(jax.random.split(key, 3 + 4 * size.num_layers))

    def matrix(rows, columns, gain=1.0):
        return (
            gain
            / rows**0.5
            * jax.random.normal(next(keys), (rows, columns), jnp.float32)
        )

    d, branch = size.width, (2 * size.num_layers) ** -0.5
    return {
        "embedding": 0.02 * jax.random.normal(next(keys), (NUM_BYTES, d), jnp.float32),
        "positions": 0.02
        * jax.random.normal(next(keys), (size.context, d), jnp.float32),
        "layers": [
            {
                "attention": {"qkv": matrix(d, 3 * d), "out": matrix(d, d, branch)},
                "mlp": {"up": matrix(d, 4 * d), "down": matrix(4 * d, d, branch)},
                "norms": jnp.ones((2, d), jnp.float32),
            }
            for _ in range(size.num_layers)
        ],
        "norm": jnp.ones(d, jnp.float32),
        "head": matrix(d, NUM_BYTES, 0.5),
    }


def compute_logits(params, tokens, num_heads):
    """Return logits [batch, time, 256] of the next byte at each place of tokens [batch, time]."""
    x = params["embedding"][tokens] + params["positions"][: tokens.shape[-1]][None]
    for layer in params["layers"]:
        x = x + _attend(layer["attention"], _normalize(x, layer["norms"][0]), num_heads)
        hidden = jax.nn.gelu(
            linear(_normalize(x, layer["norms"][1]), layer["mlp"]["up"])
        )
        x = x + linear(hidden, layer["mlp"]["down"])
    return linear(_normalize(x, params["norm"]), params["head"])


def bits_per_byte(params, text, num_heads):
    """Return the mean cross-entropy in bits of bytes text[:, 1:] given those before them."""
    logits = compute_logits(params, text[:, :-1], num_heads)
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, text[:, 1:, None], axis=-1)
    return -jnp.mean(chosen) / jnp.log(2.0)


def _attend(weights, x, num_heads):
    batch, time, width = x.shape
    qkv = linear(x, weights["qkv"]).reshape(
        batch, time, 3, num_heads, width // num_heads
    )
    mixed = jax.nn.dot_product_attention(
        qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True
    )
    return linear(mixed.reshape(batch, time, width), weights["out"])


def _normalize(x, gain):
    return (
        x
        * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        * gain[None, None]
    )
