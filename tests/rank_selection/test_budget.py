"""One budget of parameters over many layers."""

import itertools

import jax
import numpy as np
import pytest

import jlora


def list_allocations(spectra, costs, budget):
    every = itertools.product(*(range(len(s) + 1) for s in spectra))
    return [ranks for ranks in every if np.dot(ranks, costs) <= budget]


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_optimal_up_to_one_rank(seed):
    rng = np.random.default_rng(seed)
    shapes = [(5, 4), (9, 6), (4, 12)]
    spectra = [np.sort(rng.exponential(size=4))[::-1] for _ in shapes]
    costs = [sum(shape) for shape in shapes]
    for budget in (0, 8, 20, 50, 100, 10_000):
        ranks = jlora.allocate_ranks(spectra, budget=budget, shapes=shapes)
        assert np.dot(ranks, costs) <= budget

        def measure(ranks):
            return sum(
                np.sum(s[:rank] ** 2) for s, rank in zip(spectra, ranks, strict=True)
            )

        best = max(map(measure, list_allocations(spectra, costs, budget)))
        # A knapsack: the greedy choice may miss the energy of one rank, at most the
        # largest value that it did not choose.
        unchosen = [
            s[rank] ** 2
            for s, rank in zip(spectra, ranks, strict=True)
            if rank < len(s)
        ]
        assert measure(ranks) >= best - max(unchosen, default=0)
        if budget == 10_000:
            assert ranks == [4, 4, 4]


def test_allocation_keeps_its_limits():
    spectra = {"q": 2.0 ** -np.arange(20), "k": np.ones(20), "v": 0.1 * np.ones(20)}
    shapes = dict.fromkeys(spectra, (20, 30))
    ranks = jlora.allocate_ranks(
        spectra,
        budget=50 * 30,
        shapes=shapes,
        minimum={"q": 1, "k": 0, "v": 2},
        maximum={"q": 20, "k": 16, "v": 20},
        multiple_of=8,
    )
    assert list(ranks) == ["q", "k", "v"]
    # 30 ranks: the minima round up to 8, and only one step of 8 fits into the other
    # 14.
    assert ranks == {"q": 8, "k": 8, "v": 8}

    more = jlora.allocate_ranks(spectra, budget=50 * 44, shapes=shapes, multiple_of=8)
    assert more == {"q": 8, "k": 20, "v": 16}  # the last values of k make a step of 4

    plain = jlora.allocate_ranks(spectra, budget=50 * 6, shapes=shapes)
    assert plain["v"] == 0
    valued = jlora.allocate_ranks(
        spectra, budget=50 * 6, shapes=shapes, weights={"q": 1, "k": 1, "v": 1e4}
    )
    assert valued == {"q": 0, "k": 0, "v": 6}

    svds = [
        jlora.truncated_svd(normal, 3)
        for normal in jax.random.normal(jax.random.key(0), (2, 6, 5))
    ]
    assert sum(jlora.allocate_ranks(svds, budget=11 * 4)) == 4


def test_allocation_prefers_the_cheaper_layer():
    spectra = {"small": np.array([1.0, 1.0]), "large": np.array([1.1, 1.1])}
    shapes = {"small": (4, 4), "large": (40, 40)}
    assert jlora.allocate_ranks(spectra, budget=90, shapes=shapes) == {
        "small": 2,
        "large": 0,
    }


def test_a_layer_that_cannot_be_bought_leaves_the_budget_to_others():
    spectra = {"big": np.full(50, 20.0), "small": np.ones(5)}
    shapes = {"big": (500, 500), "small": (5, 5)}  # 1000 and 10 parameters a rank
    expected = {49: (0, 4), 50: (0, 5), 500: (0, 5), 999: (0, 5), 1000: (1, 0)}
    for budget, ranks in (expected | {1050: (1, 5), 10**30: (50, 5)}).items():
        found = jlora.allocate_ranks(spectra, budget=budget, shapes=shapes)
        assert found == dict(zip(("big", "small"), ranks, strict=True))


def measure_energy(layers, ranks):
    return sum(
        np.sum(s[:rank] ** 2) for (s, _), rank in zip(layers, ranks, strict=True)
    )


def search_exhaustively(layers, budget):
    """Return the largest energy, and that of the best rank that fits by itself."""
    choices = itertools.product(*(range(len(s) + 1) for s, _ in layers))
    costs = np.array([sum(shape) for _, shape in layers])
    best = max(
        measure_energy(layers, ranks)
        for ranks in choices
        if np.dot(costs, ranks) <= budget
    )
    fitting = [s[0] ** 2 for (s, shape) in layers if sum(shape) <= budget]
    return best, max(fitting, default=0.0)


@pytest.mark.parametrize("seed", range(30))
def test_energy_misses_the_optimum_by_less_than_one_rank(seed):
    rng = np.random.default_rng(seed)
    kinds = ("random", "ties", "zeros")
    layers = []
    for number in range(rng.integers(1, 5)):
        size = int(rng.integers(1, 5))
        values = {
            "random": np.sort(rng.exponential(size=size))[::-1],
            "ties": np.ones(size),
            "zeros": np.zeros(size),
        }[kinds[(seed + number) % 3]]
        layers.append((values, tuple(map(int, rng.integers(size, 60, 2)))))

    spectra, shapes = [s for s, _ in layers], [shape for _, shape in layers]
    for budget in (0, 7, 40, 90, 200, 500, 2000):
        ranks = jlora.allocate_ranks(spectra, budget=budget, shapes=shapes)
        assert sum(r * sum(x) for r, x in zip(ranks, shapes, strict=True)) <= budget
        best, one_rank = search_exhaustively(layers, budget)
        assert best - measure_energy(layers, ranks) <= one_rank * (1 + 1e-12)
        # No rank with energy that still fits is left.
        left = budget - sum(r * sum(x) for r, x in zip(ranks, shapes, strict=True))
        for (s, shape), rank in zip(layers, ranks, strict=True):
            assert rank == len(s) or s[rank] == 0 or sum(shape) > left


@pytest.mark.parametrize("exponent", [-1000, -500, 500, 1000])
def test_the_scale_of_the_spectra_does_not_matter(exponent):
    rng = np.random.default_rng(0)
    spectra = [np.sort(rng.exponential(size=6))[::-1] for _ in range(3)]
    scaled = [np.ldexp(s, exponent) for s in spectra]
    expected = jlora.allocate_ranks(spectra, budget=100)
    assert jlora.allocate_ranks(scaled, budget=100) == expected


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: jlora.allocate_ranks({}, budget=1), ValueError, "at least one layer"),
        (
            lambda: jlora.allocate_ranks([np.ones(3)], budget=5, minimum=2),
            ValueError,
            "`budget` must cover the minimum ranks, 12 parameters, got 5",
        ),
        (
            lambda: jlora.allocate_ranks(
                {"q": np.ones(3)}, budget=5, minimum=2, maximum=1
            ),
            ValueError,
            "`maximum` of 'q' must be at least its minimum, 2, got 1",
        ),
        (
            lambda: jlora.allocate_ranks({"q": np.array([1.0, 2.0])}, budget=5),
            ValueError,
            r"`spectra\['q'\]` must hold singular values descending",
        ),
        (
            lambda: jlora.allocate_ranks([np.ones(3)], budget=5, weights=[0.0]),
            ValueError,
            "`weights` of 0 must be positive",
        ),
        (
            lambda: jlora.allocate_ranks([np.ones(3)], budget=1.5),
            TypeError,
            "`budget` must be an integer",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
