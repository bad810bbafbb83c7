"""The embeddings of a batch by MiniLM, beside the transformers library."""

import functools

import jax
import numpy as np

import jlora
from benchmarks.models import minilm
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.run.preparation import (
    fetch_torch,
    name_torch_device,
    prepare_jax,
    set_up_torch,
    to_torch,
    wait_for_torch,
)

SUITE = "adaptation"
_FIRST_WORD, _END_OF_WORDS = 999, 30522  # ids below are no words


def make_embedding_group():
    """Return the group of the embeddings of eight sentences of up to 32 tokens."""
    # All contenders are judged by the embeddings of transformers.
    needed = (minilm.PACKAGE, "torch", "transformers")
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

    layers, tokens = minilm.NUM_LAYERS, 8 * 32
    fields = Case("minilm-l6", "all", 0, "pretrained", layers=layers, tokens=tokens)
    return Group(
        SUITE,
        "embed sentences",
        NamedCase("MiniLM-L6", (384, 384), fields),
        lambda: (minilm.load_minilm(), make_tokens(8, 32)),
        contenders,
        _measure_errors,
    )


def make_tokens(batch, time):
    """Return (ids, mask), int32 [batch, time]: random words.

    The sentences have all lengths from half of time to the whole.
    """
    rng = np.random.default_rng(0)
    words = (_FIRST_WORD, _END_OF_WORDS)
    ids = rng.integers(*words, (batch, time), dtype=np.int32)
    lengths = np.linspace(time / 2, time, batch)
    mask = (np.arange(time)[None] < lengths[:, None]).astype(np.int32)
    return ids * mask, mask


def adapt_layers(params, rank, **settings):
    """Return MiniLM's parameters, the matrices of its layers adapted by one rule."""
    plan = jlora.make_plan(params, jlora.Rule("layers/.*/w$", rank, **settings))
    return jlora.adapt(params, plan, key=jax.random.key(0))


def _prepare_embeddings(params, tokens, rank=None):
    params = params if rank is None else adapt_layers(params, rank)
    # torch computes in full float32 by default on every device, and JAX does not.
    with jax.default_matmul_precision("highest"):
        return prepare_jax(minilm.embed_sentences, params, *tokens)


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
        mean = (states * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    return embed


def _measure_errors(inputs, found):
    _, tokens = inputs
    expected = _load_transformers("cpu")(tokens).numpy()
    return {"difference": np.abs(found - expected).max()}
