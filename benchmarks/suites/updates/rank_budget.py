"""A group of the updates suite: ranks for all layers of a model under one budget."""

import numpy as np

import jlora
from benchmarks.run.cases import MODEL_SHAPES, WholeCase
from benchmarks.run.harness import Contender, Group, Prepared


def make_allocate_group(suite):
    """Return the group that shares one budget out over all matrices of Llama-2-7B."""
    sides = {"attention": 4, "mlp up": 2, "mlp down": 1}  # of each layer
    shapes = {
        f"{layer}/{kind}/{number}": MODEL_SHAPES["llama-2-7b"][kind]
        for layer in range(32)
        for kind, count in sides.items()
        for number in range(count)
    }
    budget = sum(16 * (m + n) for m, n in shapes.values())

    def make_inputs():
        rng = np.random.default_rng(0)
        return (
            {
                name: rng.uniform(1, 4)
                * np.arange(1, min(shape) + 1) ** -rng.uniform(0.2, 0.8)
                for name, shape in shapes.items()
            },
        )

    def prepare(spectra):
        def run():
            return jlora.allocate_ranks(spectra, budget=budget, shapes=shapes)

        return Prepared(run, lambda ranks: ranks)

    def measure_errors(inputs, ranks):
        (spectra,) = inputs
        kept = sum(np.sum(spectra[name][:rank] ** 2) for name, rank in ranks.items())
        return {
            "energy short of the bound": 1
            - kept / _bound_energy(spectra, shapes, budget),
            "budget left over": budget
            - sum(rank * sum(shapes[n]) for n, rank in ranks.items()),
        }

    ours = Contender(
        "jlora allocate_ranks", prepare, "jlora", "16 ranks a matrix on average"
    )
    return Group(
        suite,
        "allocate ranks",
        WholeCase(f"{len(shapes)} layers"),
        make_inputs,
        (ours,),
        measure_errors,
    )


def _bound_energy(spectra, shapes, budget):
    """Return the energy of the best allocation that may also buy a part of one rank."""
    prices = np.concatenate(
        [np.full(len(s), sum(shapes[name])) for name, s in spectra.items()]
    )
    gains = np.concatenate([s**2 for s in spectra.values()])
    order = np.argsort(-gains / prices)
    spent = np.cumsum(prices[order])
    count = np.searchsorted(spent, budget, side="right")
    left = budget - (spent[count - 1] if count else 0)
    return (
        np.sum(gains[order[:count]]) + left * gains[order[count]] / prices[order[count]]
    )
