"""A step of training MiniLM, with a contrastive loss over pairs of sentences."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks.models import minilm
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.adaptation.encoder_embeddings import adapt_layers, make_tokens

SUITE = "adaptation"


class StepResult(NamedTuple):
    """The loss before the first step, and the number and bytes that it trains."""

    loss: float
    num_trained: int
    optimizer_bytes: int


def make_step_group(rank, pairs, time):
    """Return the group of one step of Adam on MiniLM."""
    full = Contender(
        "jax full fine-tuning",
        _prepare_full_step,
        requires=(minilm.PACKAGE,),
        setting="optax.adam on every weight, jlora.linear alone; the state is donated",
    )
    contenders = (
        _make_step("jlora V only", rank, init="pissa", trainable="v"),
        _make_step("jlora LoRA", rank, init="lora", trainable="uv"),
        full,
    )

    def make_inputs():
        params, tokens = minilm.load_minilm(), make_tokens(2 * pairs, time)
        return params, tokens, _compute_exact_loss(params, tokens)

    layers, tokens = minilm.NUM_LAYERS, 2 * pairs * time
    name = f"MiniLM-L6, {pairs} pairs of {time} tokens, rank {rank}, float32"
    fields = Case("minilm-l6", "all", rank, "pretrained", layers=layers, tokens=tokens)
    return Group(
        SUITE,
        "training step",
        NamedCase(name, (384, 384), fields),
        make_inputs,
        contenders,
        _measure_errors,
        precision="default",
    )


def contrastive_loss(params, tokens):
    """Return the cross-entropy of finding each sentence's partner.

    The partner of sentence i is sentence i + half of the batch.
    """
    embeddings = minilm.embed_sentences(params, *tokens)
    first, second = jnp.split(embeddings, 2)
    logits = 20.0 * (first @ second.T)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


def _make_step(name, rank, *, init, trainable):
    setting = (
        f"init {init!r}, trainable {trainable!r}, all matrices of the layers; "
        "jlora.train_step with optax.adam, the state is donated"
    )
    return Contender(
        name,
        functools.partial(_prepare_step, rank, init, trainable),
        "jlora",
        setting,
        requires=(minilm.PACKAGE,),
    )


def _prepare_step(rank, init, trainable, params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    adapted = adapt_layers(params, rank, init=init, trainable=trainable)
    state, frozen = jlora.init_train(adapted, optimizer)

    def step(carried, frozen, tokens):
        state, _ = carried
        return jlora.train_step(contrastive_loss, optimizer, state, frozen, tokens)

    def fetch(result):
        state, loss = result
        return StepResult(float(loss), *jlora.training.measure_cost(state))

    # A step returns the state and the loss: carry a loss too.
    initial = state, jnp.zeros((), jnp.float32)
    prepared = prepare_jax(step, initial, frozen, tokens, donate=(0,))
    return prepared._replace(fetch=fetch)


def _prepare_full_step(params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    params = jax.tree.map(jnp.array, params)  # a copy, because it is donated

    def step(carried, tokens):
        params, state, _ = carried
        loss, gradient = jax.value_and_grad(contrastive_loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def fetch(result):
        params, state, loss = result
        num_trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return StepResult(float(loss), num_trained, num_bytes)

    initial = params, optimizer.init(params), jnp.zeros((), jnp.float32)
    prepared = prepare_jax(step, initial, tokens, donate=(0,))
    return prepared._replace(fetch=fetch)


def _compute_exact_loss(params, tokens):
    """Return the loss of the plain weights in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return float(jax.jit(contrastive_loss)(params, tokens))


def _measure_errors(inputs, step):
    *_, exact = inputs
    return {
        "loss difference": abs(step.loss - exact) / abs(exact),
        "trained numbers": step.num_trained,
        "optimizer bytes": step.optimizer_bytes,
    }
