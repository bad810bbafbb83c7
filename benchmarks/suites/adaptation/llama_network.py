"""A Llama-shaped model whose linear products are left open, with random weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.suites.adaptation.llama_weights import list_layer_shapes

HEAD_SIZE = 128


class Network(NamedTuple):
    """The arrays that a model is trained from, NumPy, by path: "layers/0/q"."""

    weights: dict  # {path: [m, n]}
    factors: dict  # {path: (u [m, r], v [r, n])}
    batch: tuple  # (x, y) [tokens, hidden]
    rank: int
    loss: float  # in float64


def make_network(hidden, layers, tokens, rank):
    """Return a `Network` whose deltas are about as large as its weights."""
    rng = np.random.default_rng(0)
    weights, factors = {}, {}
    for layer in range(layers):
        for kind, (m, n) in list_layer_shapes(hidden).items():
            path = f"layers/{layer}/{kind}"
            weights[path] = _draw(rng, (m, n), m**-0.5)
            u, v = _draw(rng, (m, rank), m**-0.5), _draw(rng, (rank, n), rank**-0.5)
            factors[path] = u, v
    batch = tuple(_draw(rng, (tokens, hidden), 1.0) for _ in range(2))

    loss = _compute_exact_loss(factors, weights, batch)
    return Network(weights, factors, batch, rank, loss)


def _draw(rng, shape, scale):
    return np.float32(scale) * rng.standard_normal(shape, np.float32)


def _compute_exact_loss(*arguments):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        return float(jax.jit(hand_written_loss)(*arguments))


def plain_loss(weights, batch):
    """Return the loss of the model of plain products, as a user writes it."""
    x, y = batch
    found = run_network(x, count_layers(weights), lambda path, x: x @ weights[path])
    return compare(found, y)


def hand_written_loss(factors, weights, batch):
    """Return the loss of the model whose products call `jlora.apply_factors`."""
    x, y = batch

    def multiply(path, x):
        return jlora.apply_factors(x, jlora.Factors(*factors[path]), weights[path])

    return compare(run_network(x, count_layers(weights), multiply), y)


def compare(found, y):
    """Return the mean squared difference."""
    return jnp.mean((found - y) ** 2)


def count_layers(paths):
    """Return the number of layers that some paths belong to."""
    return 1 + max(int(path.split("/")[1]) for path in paths)


def run_network(x, layers, multiply, attend=None):
    """Return the hidden states [t, d] after some layers.

    Args:
        multiply: (path, x) → the product of x with the weight of a path.
        attend: (q, k, v) → causal self-attention, all [t, d]. None: by `jax.nn`.
    """
    attend = attend or _attend
    for layer in range(layers):

        def product(kind, x, prefix=f"layers/{layer}/"):
            return multiply(prefix + kind, x)

        normed = _normalize(x)
        q, k, v = (product(kind, normed) for kind in "qkv")
        x = x + product("o", attend(q, k, v))

        normed = _normalize(x)
        gated = jax.nn.silu(product("gate", normed)) * product("up", normed)
        x = x + product("down", gated)
    return x


def _normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _attend(q, k, v):
    """Return causal self-attention [t, d] of q, k, v [t, d] in heads."""
    size = min(HEAD_SIZE, q.shape[-1])
    q, k, v = (each.reshape(1, len(each), -1, size) for each in (q, k, v))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return mixed.reshape(q.shape[1], -1)
