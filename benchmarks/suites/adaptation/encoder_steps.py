"""Groups of the adaptation suite: MiniLM's embeddings, and a step of training it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.models import minilm
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.harness import Contender, Group, Prepared
from benchmarks.run.preparation import (
    fetch_torch,
    name_torch_device,
    prepare_jax,
    set_up_torch,
    to_torch,
    wait_for_torch,
)

SUITE = "adaptation"


def make_embedding_group():
    """Return the group of the embeddings of a batch, against those of transformers."""
    needed = (
        minilm.PACKAGE,
        "torch",
        "transformers",
    )  # the last for what ours is held against
    contenders = (
        Contender(
            "jlora, plain weights",
            _prepare_embeddings,
            "jlora",
            "jitted, matmul precision highest",
            needed,
        ),
        Contender(
            "jlora, adapted weights",
            functools.partial(_prepare_embeddings, rank=16),
            "jlora",
            "the same; pissa of rank 16 on all matrices of the layers",
            needed,
        ),
        Contender(
            "transformers",
            _prepare_transformers,
            setting="AutoModel, eval, inference_mode",
            requires=needed,
        ),
    )
    fields = Case(
        "minilm-l6", "all", 0, "pretrained", layers=minilm.NUM_LAYERS, tokens=8 * 32
    )
    case = NamedCase("MiniLM-L6", (384, 384), fields)
    return Group(
        SUITE,
        "embed sentences",
        case,
        lambda: (minilm.load_minilm(), make_tokens(8, 32)),
        contenders,
        _measure_embeddings,
    )


def make_tokens(batch, time):
    """Return (ids, mask), int32 [batch, time]: random words, in sentences from half that length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(
        999, 30522, (batch, time), dtype=np.int32
    )  # before 999: no words
    mask = (np.arange(time)[None] < np.linspace(time / 2, time, batch)[:, None]).astype(
        np.int32
    )
    return ids * mask, mask


def _prepare_embeddings(params, tokens, rank=None):
    params = params if rank is None else _adapt_layers(params, rank)
    # Full float32 is torch's default on every device, and not JAX's.
    with jax.default_matmul_precision("highest"):
        return prepare_jax(minilm.embed_sentences, params, *tokens)


def _adapt_layers(params, rank, **settings):
    plan = jlora.make_plan(params, jlora.Rule("layers/.*/w$", rank, **settings))
    return jlora.adapt(params, plan, key=jax.random.key(0))


def _prepare_transformers(params, tokens):
    set_up_torch()
    embed = _load_transformers(name_torch_device())
    return Prepared(lambda: wait_for_torch(embed(tokens)), fetch_torch, pool="torch")


@functools.cache
def _load_transformers(device):
    """Return a function of (ids, mask), the embeddings by the transformers library."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = str(minilm.find_minilm())
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    model = model.eval().to(device)

    @torch.inference_mode()
    def embed(tokens):
        ids, mask = (to_torch(part, device).long() for part in tokens)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        return torch.nn.functional.normalize(
            (states * weight).sum(1) / weight.sum(1), dim=-1
        )

    return embed


def _measure_embeddings(inputs, found):
    expected = _load_transformers("cpu")(inputs[1]).numpy()
    return {"difference": np.abs(found - expected).max()}


def make_step_group(rank, pairs, time):
    """Return the group of one step of Adam on MiniLM, with a contrastive loss over pairs."""
    contenders = (
        _make_step("jlora V only", rank, init="pissa", trainable="v"),
        _make_step("jlora LoRA", rank, init="lora", trainable="uv"),
        Contender(
            "jax full fine-tuning",
            _prepare_full_step,
            requires=(minilm.PACKAGE,),
            setting="optax.adam on every weight, jlora.linear alone; the state is donated",
        ),
    )
    name = f"MiniLM-L6, {pairs} pairs of {time} tokens, rank {rank}, float32"
    fields = Case(
        "minilm-l6",
        "all",
        rank,
        "pretrained",
        layers=minilm.NUM_LAYERS,
        tokens=2 * pairs * time,
    )

    def make_inputs():
        params, tokens = minilm.load_minilm(), make_tokens(2 * pairs, time)
        return params, tokens, _compute_exact_loss(params, tokens)

    return Group(
        SUITE,
        "training step",
        NamedCase(name, (384, 384), fields),
        make_inputs,
        contenders,
        _measure_step,
        precision="default",
    )


def contrastive_loss(params, tokens):
    """Return the cross-entropy of finding each sentence's partner; pairs are i and i + half."""
    embeddings = minilm.embed_sentences(params, *tokens)
    first, second = jnp.split(embeddings, 2)
    logits = 20.0 * (first @ second.T)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits)))


class _Step(NamedTuple):
    """What is judged of the first step."""

    loss: float
    num_trained: int
    optimizer_bytes: int


def _make_step(name, rank, **settings):
    setting = f"init {settings['init']!r}, trainable {settings['trainable']!r}, all matrices of the layers; "
    return Contender(
        name,
        functools.partial(_prepare_step, rank, settings),
        "jlora",
        setting + "jlora.train_step with optax.adam, the state is donated",
        requires=(minilm.PACKAGE,),
    )


def _prepare_step(rank, settings, params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    state, frozen = jlora.init_train(_adapt_layers(params, rank, **settings), optimizer)

    def step(carried, frozen, tokens):
        return jlora.train_step(contrastive_loss, optimizer, carried[0], frozen, tokens)

    def fetch(result):
        state, loss = result
        return _Step(float(loss), *jlora.training.measure_cost(state))

    start = (
        state,
        jnp.zeros((), jnp.float32),
    )  # the place of the loss, which comes out beside it
    return prepare_jax(step, start, frozen, tokens, donate=(0,))._replace(fetch=fetch)


def _prepare_full_step(params, tokens, exact_loss):
    optimizer = optax.adam(1e-4)
    params = jax.tree.map(jnp.array, params)  # a copy: it is donated

    def step(carried, tokens):
        params, state, _ = carried
        loss, gradient = jax.value_and_grad(contrastive_loss)(params, tokens)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    def fetch(result):
        params, state, loss = result
        num_trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        return _Step(
            float(loss),
            num_trained,
            sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        )

    start = params, optimizer.init(params), jnp.zeros((), jnp.float32)
    return prepare_jax(step, start, tokens, donate=(0,))._replace(fetch=fetch)


def _compute_exact_loss(params, tokens):
    """Return the loss of the plain weights in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        return float(jax.jit(contrastive_loss)(params, tokens))


def _measure_step(inputs, step):
    exact = inputs[-1]
    return {
        "loss difference": abs(step.loss - exact) / abs(exact),
        "trained numbers": step.num_trained,
        "optimizer bytes": step.optimizer_bytes,
    }
