"""A small encoder and decoder that translates, as a function of a tree of weights.

Every matrix product with a weight goes through `jlora.linear`, so the same function
runs on the plain tree and on the adapted tree.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora

PADDING, START, END = 0, 1, 2  # tokens


class TranslatorSize(NamedTuple):
    """Sizes of the model."""

    num_tokens: int
    source_length: int
    target_length: int  # with START and END
    width: int = 128
    num_layers: int = 2  # of the encoder, and of the decoder
    num_heads: int = 4


def init_translator(size: TranslatorSize, key: jax.Array) -> dict[str, Any]:
    """Return random weights, matrices as [inputs, outputs].

    The tree has this structure; `cross` is in the layers of the decoder only:

        embedding, source_positions, target_positions, norms, head
        encoder, decoder    lists of dictionaries:
            self     qkv, out
            cross    q, kv, out
            mlp      up, down
            norms    [2 or 3, width]
    """
    keys = iter(jax.random.split(key, 8 + 16 * size.num_layers))
    width = size.width

    def matrix(rows, columns, gain=1.0):
        shape = rows, columns
        return gain * rows**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    def layer(has_cross):
        weights = {
            "self": {"qkv": matrix(width, 3 * width), "out": matrix(width, width, 0.5)},
            "mlp": {
                "up": matrix(width, 4 * width),
                "down": matrix(4 * width, width, 0.5),
            },
            "norms": jnp.ones((2 + has_cross, width), jnp.float32),
        }
        if has_cross:
            weights["cross"] = {
                "q": matrix(width, width),
                "kv": matrix(width, 2 * width),
                "out": matrix(width, width, 0.5),
            }
        return weights

    return {
        "embedding": matrix(size.num_tokens, width, size.num_tokens**0.5 / 10),
        "source_positions": matrix(size.source_length, width, 0.5),
        "target_positions": matrix(size.target_length, width, 0.5),
        "encoder": [layer(False) for _ in range(size.num_layers)],
        "decoder": [layer(True) for _ in range(size.num_layers)],
        "norms": jnp.ones((2, width), jnp.float32),
        "head": matrix(width, size.num_tokens),
    }


def encode(params, source, num_heads):
    """Return the encoder's output [batch, time, width] for tokens [batch, time]."""
    is_token = (source != PADDING)[:, None, None, :]
    x = params["embedding"][source] + params["source_positions"][None]
    for layer in params["encoder"]:
        norms = layer["norms"]
        x = x + _attend_self(
            layer["self"], _normalize(x, norms[0]), num_heads, is_token
        )
        x = x + _transform(layer["mlp"], _normalize(x, norms[1]))
    return _normalize(x, params["norms"][0])


def decode(params, encoded, source, target, num_heads):
    """Return logits [batch, time, num_tokens] of the token after each target token.

    Args:
        encoded: Result of `encode` for `source`.
        target: Integers [batch, time], beginning with START.
    """
    is_token = (source != PADDING)[:, None, None, :]
    time = target.shape[-1]
    is_past = jnp.tril(jnp.ones((time, time), bool))[None, None]

    x = params["embedding"][target] + params["target_positions"][None, :time]
    for layer in params["decoder"]:
        norms = layer["norms"]
        x = x + _attend_self(layer["self"], _normalize(x, norms[0]), num_heads, is_past)
        x = x + _attend_cross(
            layer["cross"], _normalize(x, norms[1]), encoded, num_heads, is_token
        )
        x = x + _transform(layer["mlp"], _normalize(x, norms[2]))
    return jlora.linear(_normalize(x, params["norms"][1]), params["head"])


def translate(params, source, num_heads, length):
    """Return the most likely tokens [batch, length], chosen one after the other."""
    encoded = encode(params, source, num_heads)
    first = jnp.full((len(source), length + 1), PADDING).at[:, 0].set(START)

    def step(index, target):
        logits = decode(params, encoded, source, target[:, :-1], num_heads)
        chosen = jnp.argmax(logits[:, index], axis=-1)
        return target.at[:, index + 1].set(chosen)

    return jax.lax.fori_loop(0, length, step, first)[:, 1:]


def _attend_self(weights, x, num_heads, mask):
    qkv = jlora.linear(x, weights["qkv"])
    return _attend(weights["out"], *jnp.split(qkv, 3, axis=-1), num_heads, mask)


def _attend_cross(weights, x, encoded, num_heads, mask):
    keys, values = jnp.split(jlora.linear(encoded, weights["kv"]), 2, axis=-1)
    query = jlora.linear(x, weights["q"])
    return _attend(weights["out"], query, keys, values, num_heads, mask)


def _attend(out, query, keys, values, num_heads, mask):
    heads = [
        each.reshape(*each.shape[:2], num_heads, -1) for each in (query, keys, values)
    ]
    mixed = jax.nn.dot_product_attention(*heads, mask=mask)
    return jlora.linear(mixed.reshape(query.shape), out)


def _transform(weights, x):
    return jlora.linear(jax.nn.gelu(jlora.linear(x, weights["up"])), weights["down"])


def _normalize(x, gain):
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6) * gain[None, None]
