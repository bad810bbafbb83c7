"""The rules that choose a rank from singular values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.matrices import NUM_SPIKES, make_spiked
from jlora.rank_selection import rules

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


def test_values_beyond_float32_are_finite():
    assert jlora.choose_rank(np.array([1e100, 1e99]), energy=0.9).rank == 1


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

    # From the noise, from the median of all values, and from the tail.
    for matrix, settings in (
        (a, {"noise": noise}),
        (values, {"shape": shape}),
        (values[:30], {"shape": shape, "norm": np.linalg.norm(a)}),
    ):
        assert jlora.choose_rank(matrix, rule, **settings).rank == NUM_SPIKES

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


A = np.ones((4, 3))


@pytest.mark.wrong_types
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
            "`norm` must be given for the rule 'gavish_donoho' where only the leading",
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
            "`norm` must be at least 1.73205, the norm of the singular values given",
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
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("exponent", [-1000, -300, 300, 1000])
@pytest.mark.parametrize("rule", rules.RULES)
def test_the_scale_of_the_spectrum_does_not_matter(rule, exponent):
    values = np.linalg.svd(np.random.default_rng(0).standard_normal((30, 20)))[1]
    expected = jlora.choose_rank(values, rule, shape=(30, 20))
    found = jlora.choose_rank(np.ldexp(values, exponent), rule, shape=(30, 20))
    assert found.rank == expected.rank
    np.testing.assert_allclose(found.curve, expected.curve, rtol=1e-12)
