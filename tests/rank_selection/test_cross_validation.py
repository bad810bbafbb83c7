"""The choice of a rank by bi-cross-validation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora


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
    def choose(a, max_rank, seed=0):
        return jlora.rank_selection.cross_validate_rank(
            a, max_rank=max_rank, key=jax.random.key(seed)
        )

    assert choose(jnp.zeros((20, 16)), 4).rank == 0
    noise = jax.random.normal(jax.random.key(0), (80, 80))
    assert choose(noise, 8, seed=1).rank == 0

    low = jlora.reconstruct(jlora.Factors(noise[:, :3], noise[:3]))
    for scale in (1e-15, 1e15):
        rank, curve = choose(scale * low, 8)
        assert rank >= 3
        assert curve[2] < 1e-8

    again = [choose(noise, 4).curve for _ in range(2)]
    np.testing.assert_array_equal(*again)


A = np.ones((4, 3))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
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
