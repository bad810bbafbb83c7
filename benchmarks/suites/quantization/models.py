"""PiSSA of a whole model, with the residual in float32 and in NF4."""

import functools

import jax

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.adaptation.llama_weights import WEIGHT_NAMES, make_model
from benchmarks.suites.quantization.formats import SUITE
from jlora.quantization import nf4

PLAIN, QUANTIZED = "jlora pissa", "jlora pissa, nf4 residual"
_RANK = 16


def make_model_group(hidden, layers):
    """Return the group of `jlora.adapt` of all matrices of a model."""
    num_matrices = layers * len(WEIGHT_NAMES)
    name = f"hidden {hidden}, {layers} layers, {num_matrices} matrices, rank {_RANK}"
    fields = Case("llama", "all", _RANK, "spiked", layers=layers)
    contenders = [
        Contender(
            name,
            functools.partial(_prepare, format=format),
            "jlora",
            f"jlora.adapt, quantize={format and format.label}",
            least_runs=3,
        )
        for name, format in ((QUANTIZED, nf4()), (PLAIN, None))
    ]
    return Group(
        SUITE,
        "pissa of a model",
        NamedCase(name, (hidden, hidden), fields),
        lambda: (make_model(hidden, layers, "float32"),),
        tuple(contenders),
        _measure,
    )


def _prepare(model, format):
    params = model.in_jax
    rule = jlora.Rule(".*", _RANK, init="pissa", quantize=format)
    plan = jlora.make_plan(params, rule)

    def run():
        adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        return jax.block_until_ready(adapted)

    return Prepared(run, lambda adapted: adapted)


def _measure(inputs, adapted):
    """Return the largest relative error of the adapted weights."""
    (model,) = inputs
    found = jlora.diagnose(model.in_jax, _take_first(adapted), key=jax.random.key(1))
    return {"relative error": float(found.change.max())}


def _take_first(adapted):
    """Return the weights of the first layer: a diagnosis of all would take minutes."""
    names = list(adapted)[: len(WEIGHT_NAMES)]
    return {name: adapted[name] for name in names}
