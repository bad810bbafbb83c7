"""The ranks of all layers of a model under one budget."""

import numpy as np

import jlora
from benchmarks.run.cases import MODEL_SHAPES, WholeCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.updates.factors import SUITE

_NUM_LAYERS = 32
_MATRICES_OF_LAYER = {"attention": 4, "mlp up": 2, "mlp down": 1}
_MEAN_RANK = 16


def make_allocate_group():
    """Return the group that divides one budget among all matrices of Llama-2-7B."""
    shapes = _list_shapes()
    budget = sum(_MEAN_RANK * (m + n) for m, n in shapes.values())

    def prepare(spectra):
        def run():
            return jlora.allocate_ranks(spectra, budget=budget, shapes=shapes)

        return Prepared(run, lambda ranks: ranks)

    def measure_errors(inputs, ranks):
        (spectra,) = inputs
        bound = _bound_energy(spectra, shapes, budget)
        kept = sum(np.sum(spectra[name][:rank] ** 2) for name, rank in ranks.items())
        spent = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        return {
            "energy short of the bound": 1 - kept / bound,
            "budget left over": budget - spent,
        }

    ours = Contender(
        "jlora allocate_ranks", prepare, "jlora", "16 ranks a matrix on average"
    )
    return Group(
        SUITE,
        "allocate ranks",
        WholeCase(f"{len(shapes)} layers"),
        lambda: (_make_spectra(shapes),),
        (ours,),
        measure_errors,
    )


def _list_shapes():
    shapes = {}
    for layer in range(_NUM_LAYERS):
        for kind, count in _MATRICES_OF_LAYER.items():
            for number in range(count):
                shapes[f"{layer}/{kind}/{number}"] = MODEL_SHAPES["llama-2-7b"][kind]
    return shapes


def _make_spectra(shapes):
    """Return {name: singular values} that decay like powers, each at its own rate."""
    rng = np.random.default_rng(0)
    spectra = {}
    for name, shape in shapes.items():
        largest = rng.uniform(1, 4)
        index = np.arange(1, min(shape) + 1)
        spectra[name] = largest * index ** -rng.uniform(0.2, 0.8)
    return spectra


def _bound_energy(spectra, shapes, budget):
    """Return the energy of the best allocation that may also buy a part of one rank."""
    sizes = [np.full(len(s), sum(shapes[name])) for name, s in spectra.items()]
    prices = np.concatenate(sizes)
    gains = np.concatenate([s**2 for s in spectra.values()])

    # Buy the singular values in the order of their gain per price.
    order = np.argsort(-gains / prices)
    prices, gains = prices[order], gains[order]
    spent = np.cumsum(prices)
    count = np.searchsorted(spent, budget, side="right")
    remainder = budget - (spent[count - 1] if count else 0)
    return np.sum(gains[:count]) + remainder * gains[count] / prices[count]
