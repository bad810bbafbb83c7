"""The PiSSA initialisation of all weights of a model: first factors and residuals."""

import functools

import jax.numpy as jnp
import numpy as np

from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.svd_errors import compute_singular_values
from benchmarks.suites.adaptation.jlora_models import (
    prepare_adapt,
    prepare_cold,
    prepare_stacked,
)
from benchmarks.suites.adaptation.llama_weights import (
    LAYERS_AT_ONCE,
    SUITE,
    WEIGHT_NAMES,
    count_repeats,
    list_layer_shapes,
    make_model,
)
from benchmarks.suites.adaptation.peft_models import prepare_peft

# For larger models PEFT's exact decomposition of all weights takes many minutes.
_LARGEST_EXACT = 2048


def make_model_group(hidden, layers, rank, dtype, *, is_full):
    """Return the group of the PiSSA initialisation of all weights of a model."""
    ours = Contender(
        "jlora adapt",
        functools.partial(prepare_adapt, rank),
        "jlora",
        _describe("all weights of the tree in one call; defaults", layers),
    )
    contenders = [
        ours,
        _make_peft("pissa_niter_4", rank, layers),
        _make_peft("pissa_niter_16", rank, layers),
    ]

    if is_full:
        stacked = Contender(
            "jlora adapt, stacked",
            functools.partial(prepare_stacked, rank),
            "jlora",
            _describe("the weights of one name as one stack; defaults", layers),
        )
        contenders.append(stacked)
    if is_full and hidden <= _LARGEST_EXACT:
        contenders.append(_make_peft("pissa", rank, layers, most_runs=1))
    return _make_group(hidden, layers, rank, dtype, contenders)


def make_cold_group(hidden, layers, rank, dtype):
    """Return the group of the first call, compilation included.

    Its contender has no peers in the group: to empty JAX's caches would make them
    compile again.
    """
    contender = Contender(
        "jlora adapt, cold",
        functools.partial(prepare_cold, rank),
        "jlora",
        _describe("as jlora adapt, after jax.clear_caches()", layers),
        most_runs=3,
    )
    return _make_group(hidden, layers, rank, dtype, [contender])


def _make_peft(init, rank, layers, most_runs=None):
    setting = (
        f"init_lora_weights={init!r}, lora_alpha = r; the modules around the weights "
        "are built and get_peft_model is run in each run"
    )
    return Contender(
        f"peft {init}",
        functools.partial(prepare_peft, init, rank),
        setting=_describe(setting, layers),
        requires=("peft", "torch"),
        most_runs=most_runs,
    )


def _describe(setting, layers):
    if layers <= LAYERS_AT_ONCE:
        return setting
    times = count_repeats(layers)
    return f"{setting}; {LAYERS_AT_ONCE} layers at a time, {times} times"


def _make_group(hidden, layers, rank, dtype, contenders):
    shapes = list_layer_shapes(hidden).values()
    num_values = float(layers * sum(m * n for m, n in shapes))
    num_matrices = layers * len(WEIGHT_NAMES)
    name = (
        f"Llama-shaped, hidden {hidden}, {layers} layers, {num_matrices} matrices, "
        f"rank {rank}, {dtype}"
    )
    fields = Case("llama", "all", rank, dtype=dtype, layers=layers)

    return Group(
        SUITE,
        "pissa initialisation",
        NamedCase(name, (hidden, hidden), fields),
        lambda: (make_model(hidden, layers, dtype),),
        tuple(contenders),
        functools.partial(_measure_errors, rank),
        # A sketch, a projection and the subtraction. Each weight is read, and its
        # residual is written.
        flops=6.0 * num_values * rank,
        bytes=2.0 * num_values * jnp.dtype(dtype).itemsize,
    )


def _measure_errors(rank, inputs, result):
    """Return the largest excess error in the first and the last layer, and the rest."""
    (model,) = inputs
    factors, others = result
    checked = ("layers/0/", f"layers/{model.num_layers - 1}/")

    worst, optima = -np.inf, {}
    for path, a in model.arrays.items():
        if not path.startswith(checked):
            continue
        # All weights of one shape have the same singular values, see `make_model`.
        if a.shape not in optima:
            optima[a.shape] = np.linalg.norm(compute_singular_values(a)[rank:])
        residual = _measure_residual(a, *factors[path])
        worst = max(worst, residual / optima[a.shape] - 1)
    return {"excess error": worst, **others}


def _measure_residual(a, u, v):
    a, u, v = (each.astype(np.float64) for each in (a, u, v))
    return np.linalg.norm(a - u @ v)
