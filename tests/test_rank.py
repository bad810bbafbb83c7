"""The choice of rank: rules, bi-cross-validation, one budget over many layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.matrices import NUM_SPIKES, make_spiked
from jlora.rank_selection.noise import median_of_squares, optimal_threshold

S = np.array([4.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("rule", "settings", "rank", "curve"),
    [
        ("energy", {"energy": 0.9}, 2, np.cumsum(S**2) / np.sum(S**2)),
        ("energy", {"energy": 1.0}, 4, np.cumsum(S**2) / np.sum(S**2)),
        (
            "tail",
            {"tolerance": 0.25},
            2,
            np.sqrt([5.25, 1.25, 0.25, 0]) / np.sqrt(21.25),
        ),
        (
            "tail",
            {"tolerance": 0.0},
            4,
            np.sqrt([5.25, 1.25, 0.25, 0]) / np.sqrt(21.25),
        ),
        ("stable", {}, 2, np.cumsum(S**2) / 16),
        ("gap", {}, 1, [2, 2, 2]),
    ],
)
def test_rules_on_a_known_spectrum(rule, settings, rank, curve):
    for values in (S, S.astype(np.float32), jnp.asarray(S, jnp.float32)):
        found = jlora.choose_rank(values, rule, **settings)
        assert found.rank == rank
        np.testing.assert_allclose(found.curve, curve, atol=1e-6)
    rank, curve = jlora.choose_rank(S, rule, max_rank=1, **settings)
    assert rank == 1
    assert type(rank) is int


def test_effective_rank_counts_equal_values():
    rank, curve = jlora.choose_rank(np.ones(7), "effective")
    assert rank == 7
    np.testing.assert_allclose(curve, np.arange(1, 8))
    assert jlora.choose_rank(np.array([1.0, 1.0, 1e-9]), "effective").rank == 3 - 1


@pytest.mark.parametrize(
    "rule",
    ["energy", "tail", "gavish_donoho", "marchenko_pastur", "stable", "effective"],
)
def test_the_zero_matrix_has_rank_zero(rule):
    rank, curve = jlora.choose_rank(np.zeros((5, 4)), rule)
    assert rank == 0
    assert curve.shape == (4,)


def test_matrix_svd_and_values_say_the_same():
    a = make_spiked(np.random.default_rng(0), 60, 40).astype(np.float32)
    values = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    svd = jlora.truncated_svd(jnp.asarray(a), 40)
    for rule in ("energy", "gavish_donoho", "gap", "effective"):
        ranks = {
            jlora.choose_rank(a, rule).rank,
            jlora.choose_rank(svd, rule).rank,
            jlora.choose_rank(values, rule, shape=a.shape).rank,
        }
        assert len(ranks) == 1


@pytest.mark.parametrize("rule", ["gavish_donoho", "marchenko_pastur"])
@pytest.mark.parametrize("shape", [(500, 500), (300, 900), (900, 300)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_planted_spikes_are_counted(rule, shape, seed):
    a = make_spiked(np.random.default_rng(seed), *shape)
    noise = 1 / np.sqrt(shape[1])
    values = np.linalg.svd(a, compute_uv=False)
    leading = {"shape": shape, "norm": np.linalg.norm(a)}
    assert jlora.choose_rank(a, rule, noise=noise).rank == NUM_SPIKES
    assert (
        jlora.choose_rank(values, rule, shape=shape).rank == NUM_SPIKES
    )  # from the median
    assert (
        jlora.choose_rank(values[:30], rule, **leading).rank == NUM_SPIKES
    )  # from the tail
    svd = jlora.randomized_svd(
        jnp.asarray(a, jnp.float32), 30, key=jax.random.key(seed)
    )
    found = jlora.choose_rank(svd, rule, norm=np.linalg.norm(a))
    assert found.rank == NUM_SPIKES
    assert found.curve[NUM_SPIKES - 1] > 1 > found.curve[NUM_SPIKES]


def test_a_margin_raises_the_edge():
    a = make_spiked(np.random.default_rng(0), 500, 500)
    ranks = [
        jlora.choose_rank(a, "marchenko_pastur", noise=500**-0.5, margin=margin).rank
        for margin in (0.0, 0.5, 1.0, 10.0)
    ]
    assert ranks[0] == NUM_SPIKES
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0


@pytest.mark.parametrize(
    ("beta", "omega"), [(1, 2.8582), (0.5, 2.1711), (0.25, 1.8370), (0.125, 1.6500)]
)
def test_threshold_over_the_median(beta, omega):
    # Gavish and Donoho 2014, table IV and the exact values behind it, for ω(β).
    found = optimal_threshold(beta * 1e6, 1e6, 1.0) / np.sqrt(
        1e6 * median_of_squares(beta)
    )
    assert found == pytest.approx(omega, rel=2e-4)


@pytest.mark.parametrize("seed", range(10))
def test_cross_validation_finds_the_planted_rank(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    u, v = jax.random.normal(keys[0], (120, 5)), jax.random.normal(keys[1], (5, 90))
    a = u @ v + 2.0 * jax.random.normal(keys[2], (120, 90))
    rank, curve = jlora.rank_selection.cross_validate_rank(a, max_rank=15, key=keys[3])
    assert abs(rank - 5) <= 1
    assert curve.shape == (15,)
    assert np.argmin(curve) + 1 == rank


def test_cross_validation_of_special_matrices():
    key = jax.random.key(0)
    assert (
        jlora.rank_selection.cross_validate_rank(
            jnp.zeros((20, 16)), max_rank=4, key=key
        ).rank
        == 0
    )
    noise = jax.random.normal(key, (80, 80))
    assert (
        jlora.rank_selection.cross_validate_rank(
            noise, max_rank=8, key=jax.random.key(1)
        ).rank
        == 0
    )
    low = jlora.reconstruct(jlora.Factors(noise[:, :3], noise[:3]))
    for scale in (1e-15, 1e15):
        rank, curve = jlora.rank_selection.cross_validate_rank(
            scale * low, max_rank=8, key=key
        )
        assert rank >= 3
        assert curve[2] < 1e-8
    again = [
        jlora.rank_selection.cross_validate_rank(noise, max_rank=4, key=key).curve
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*again)


def list_allocations(spectra, costs, budget):
    every = itertools.product(*(range(len(s) + 1) for s in spectra))
    return [ranks for ranks in every if np.dot(ranks, costs) <= budget]


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_optimal_but_for_one_rank(seed):
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
        # A knapsack: the greedy choice may miss the energy of one rank, the largest that is left.
        left = [
            s[rank] ** 2
            for s, rank in zip(spectra, ranks, strict=True)
            if rank < len(s)
        ]
        assert measure(ranks) >= best - max(left, default=0)
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
    # 30 ranks: the minima round up to 8, and of the 14 left only one step of 8 fits.
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


A = np.ones((4, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.choose_rank(A, "elbow"),
            ValueError,
            "`rule` must be one of 'energy'",
        ),
        (
            lambda: jlora.choose_rank(np.ones((2, 4, 3))),
            ValueError,
            r"got shape \(2, 4, 3\)",
        ),
        (
            lambda: jlora.choose_rank(np.arange(3)),
            TypeError,
            "must have a real floating dtype",
        ),
        (lambda: jlora.choose_rank(np.array([1.0, 2.0])), ValueError, "descending"),
        (lambda: jlora.choose_rank(np.array([1.0, -2.0])), ValueError, "not negative"),
        (
            lambda: jlora.choose_rank(np.array([np.nan, 1.0])),
            ValueError,
            "`a` must be finite",
        ),
        (
            lambda: jlora.choose_rank(np.full((2, 2), np.inf)),
            ValueError,
            "`a` must be finite",
        ),
        (
            lambda: jlora.choose_rank(A, energy=0.0),
            ValueError,
            r"`energy` must lie in \(0, 1\]",
        ),
        (
            lambda: jlora.choose_rank(A, "tail", tolerance=1.0),
            ValueError,
            "`tolerance` must lie",
        ),
        (
            lambda: jlora.choose_rank(A, max_rank=0),
            ValueError,
            "`max_rank` must be at least 1",
        ),
        (
            lambda: jlora.choose_rank(np.ones(1), "gap"),
            ValueError,
            "at least two singular values",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), "gavish_donoho"),
            ValueError,
            "`shape` must be given",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), "gavish_donoho", shape=(9, 8)),
            ValueError,
            "`norm` must be given for the rule 'gavish_donoho' where only the leading 3 of 8",
        ),
        (
            lambda: jlora.choose_rank(
                np.ones(3), "gavish_donoho", shape=(900, 800), norm=1.75
            ),
            ValueError,
            "must reach down into the noise .* 3 singular values of 800",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), "energy", shape=(9, 8)),
            ValueError,
            "`norm` must be given",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), "effective", shape=(9, 8), norm=2.0),
            ValueError,
            "`a` must have all 8 singular values for the rule 'effective'",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), shape=(9, 8), norm=1.0),
            ValueError,
            "`norm` must be at least that of the singular values given",
        ),
        (
            lambda: jlora.choose_rank(np.ones(3), shape=(2, 2)),
            ValueError,
            r"`shape` must be \(m, n\)",
        ),
        (
            lambda: jlora.choose_rank(A, "gavish_donoho", noise=0.0),
            ValueError,
            "`noise` must be positive",
        ),
        (
            lambda: jlora.choose_rank(A, "marchenko_pastur", margin=-1.0),
            ValueError,
            "`margin` must not",
        ),
        (
            lambda: jax.jit(lambda a: jlora.choose_rank(a).rank)(A.astype(np.float32)),
            TypeError,
            "`a` must be a concrete array",
        ),
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
        (
            lambda: jlora.rank_selection.cross_validate_rank(
                A, max_rank=3, key=jax.random.key(0), num_folds=2
            ),
            ValueError,
            "`max_rank` must be at most 2, got 3",
        ),
        (
            lambda: jlora.rank_selection.cross_validate_rank(
                A[None], max_rank=1, key=jax.random.key(0)
            ),
            ValueError,
            "must be one matrix",
        ),
        (
            lambda: jlora.rank_selection.cross_validate_rank(
                np.full((8, 8), np.nan), max_rank=2, key=jax.random.key(0)
            ),
            ValueError,
            "must be finite",
        ),
        (
            lambda: jlora.rank_selection.cross_validate_rank(A, max_rank=1, key=0),
            TypeError,
            "typed PRNG key",
        ),
        (
            lambda: jlora.rank_selection.cross_validate_rank(
                A, max_rank=1, key=jax.random.key(0), num_folds=1
            ),
            ValueError,
            "`num_folds` must be at least 2",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
