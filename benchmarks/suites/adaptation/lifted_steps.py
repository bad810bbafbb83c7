"""A step of training the LoRA factors of a Llama-shaped model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.adaptation.llama_network import (
    hand_written_loss,
    make_network,
    plain_loss,
)
from benchmarks.suites.adaptation.nnx_networks import (
    make_flax_loss,
    make_qwix_loss,
)

SUITE = "adaptation"


class Losses(NamedTuple):
    """The loss before the first step, and after it."""

    first: float
    second: float


def make_lifted_group(hidden, layers, tokens, rank):
    """Return the group of one step of Adam on u and v of all linear layers."""
    contenders = (
        Contender(
            "jlora lift",
            _prepare_lift,
            "jlora",
            "jlora.lift of the model of plain products, factors of jlora.adapt",
            requires=("quax",),
        ),
        Contender(
            "hand-written apply_factors",
            _prepare_hand_written,
            "jlora",
            "the same model, each product jlora.apply_factors",
        ),
        Contender(
            "qwix",
            lambda network: _prepare_step(*make_qwix_loss(network), network.batch),
            setting="LoraProvider on nnx.Linear, alpha = rank",
            requires=("qwix", "flax"),
        ),
        Contender(
            "flax nnx",
            lambda network: _prepare_step(*make_flax_loss(network), network.batch),
            setting="nnx.LoRALinear without bias",
            requires=("flax",),
        ),
    )

    name = f"Llama-shaped, hidden {hidden}, {layers} layers, {tokens} tokens"
    fields = Case("llama", "all", rank, "normal", layers=layers, tokens=tokens)
    return Group(
        SUITE,
        "lifted training step",
        NamedCase(name, (hidden, hidden), fields),
        lambda: (make_network(hidden, layers, tokens, rank),),
        contenders,
        _measure_errors,
        precision="default",
    )


def _prepare_lift(network):
    # Adapt the weights, then give the factors the values that all contenders have.
    rule = jlora.Rule("layers", network.rank, init="lora", trainable="uv")
    plan = jlora.make_plan(network.weights, rule)
    adapted = jlora.adapt(network.weights, plan, key=jax.random.key(0))
    factors = {path: jlora.Factors(*pair) for path, pair in network.factors.items()}
    adapted = jlora.adaptation.set_factors(adapted, factors)
    trainable, frozen = jlora.split_trainable(adapted)

    lifted = jlora.lift(plain_loss)

    def loss(trainable, frozen, batch):
        return lifted(jlora.join(trainable, frozen), batch)

    return _prepare_step(loss, trainable, frozen, network.batch)


def _prepare_hand_written(network):
    factors, weights = network.factors, network.weights
    return _prepare_step(hand_written_loss, factors, weights, network.batch)


def _prepare_step(loss, trainable, frozen, batch):
    """Prepare a step of Adam, its state donated; loss(trainable, frozen, batch)."""
    optimizer = optax.adam(1e-3)

    def step(carried, frozen, batch):
        trainable, state, _ = carried
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    initial = trainable, optimizer.init(trainable), jnp.zeros((), jnp.float32)
    prepared = prepare_jax(step, initial, frozen, batch, donate=(0,))
    evaluate = jax.jit(loss)

    def fetch(result):
        trainable, _, first = result
        return Losses(float(first), float(evaluate(trainable, frozen, batch)))

    return prepared._replace(fetch=fetch)


def _measure_errors(inputs, losses):
    (network,) = inputs
    # No exact value exists for the second. It shows that the gradient was right.
    return {
        "loss difference": abs(losses.first - network.loss) / network.loss,
        "loss after a step": losses.second / network.loss,
    }
