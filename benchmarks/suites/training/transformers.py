"""The transformer that this suite trains: its weights, its batches, its loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.suites.adaptation.llama_network import (
    HEAD_SIZE,
    compare,
    count_layers,
    run_network,
)
from benchmarks.suites.adaptation.llama_weights import list_layer_shapes

SUITE = "training"
_NUM_BATCHES = 8  # that are different; longer runs repeat them


class Sizes(NamedTuple):
    """The sizes of a model of Llama's layers, and of its factors."""

    hidden: int
    layers: int
    tokens: int  # of one batch
    rank: int


class Transformer(NamedTuple):
    """The arrays to train from, NumPy, by path: "layers/0/q"."""

    weights: dict  # {path: [m, n]}
    batches: list  # of (x, y) [tokens, hidden]
    rank: int
    loss: float  # of the weights on the first batch, in float64


def make_case(sizes, suffix=""):
    """Return the case of a model; `suffix` tells its problems apart."""
    hidden, layers, tokens, rank = sizes
    name = f"transformer, width {hidden}, layers {layers}, {tokens} tokens, rank {rank}"
    fields = Case("llama", "all", rank, "normal", layers=layers, tokens=tokens)
    return NamedCase(f"{name}{suffix}", (hidden, hidden), fields)


def make_transformer(sizes):
    """Return a `Transformer` of random weights."""
    rng = np.random.default_rng(0)
    weights = {}
    for layer in range(sizes.layers):
        for kind, (m, n) in list_layer_shapes(sizes.hidden).items():
            weights[f"layers/{layer}/{kind}"] = _draw(rng, (m, n), m**-0.5)

    shape = sizes.tokens, sizes.hidden
    batches = [
        (_draw(rng, shape, 1.0), _draw(rng, shape, 1.0)) for _ in range(_NUM_BATCHES)
    ]
    loss = _compute_exact_loss(weights, batches[0])
    return Transformer(weights, batches, sizes.rank, loss)


def plain_loss(weights, batch):
    """Return the loss of the model of plain products, as a user writes it."""
    x, y = batch

    def multiply(path, x):
        return x @ weights[path]

    return compare(run_network(x, count_layers(weights), multiply, attend), y)


def attend(q, k, v):
    """Return causal self-attention [t, d] of q, k, v [t, d] in heads.

    On a CPU, forward and backward take 0.6 of the time of
    `jax.nn.dot_product_attention`. That time is the same for all methods, and would
    hide their differences.
    """
    size = min(HEAD_SIZE, q.shape[-1])
    q, k, v = (each.reshape(len(each), -1, size).swapaxes(0, 1) for each in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * size**-0.5
    is_past = jnp.tril(jnp.ones(scores.shape, bool))
    mixed = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf), axis=-1) @ v
    return mixed.swapaxes(0, 1).reshape(mixed.shape[1], -1)


def _draw(rng, shape, scale):
    return np.float32(scale) * rng.standard_normal(shape, np.float32)


def _compute_exact_loss(*arguments):
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        return float(jax.jit(plain_loss)(*arguments))


def adapt_transformer(model, **rule):
    """Return the adapted tree of a model; its loss is still the model's loss."""
    rule = jlora.Rule("layers", model.rank, init="lora", **rule)
    plan = jlora.make_plan(model.weights, rule)
    return jlora.adapt(model.weights, plan, key=jax.random.key(0))


def compare_loss(model, loss):
    """Return the relative difference of a first loss from the exact one."""
    return abs(loss - model.loss) / model.loss
