"""Warm starts of the randomized SVD."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.helpers.accuracy import optimal_error, orthonormality, residual
from tests.helpers.matrices import make_float32

KEY = jax.random.key(0)


@pytest.mark.parametrize("spectrum", ["spiked", "flat", "low rank plus noise"])
def test_warm_start_beats_cold_at_equal_passes(spectrum):
    a = make_float32(spectrum, 240, 200)
    drifted = a + 0.02 * jnp.linalg.norm(a) / 220 * jax.random.normal(
        KEY, a.shape, a.dtype
    )

    warm_start = jlora.truncated_svd(a, 12)
    best = optimal_error(drifted, 12)

    for passes in (2, 3, 4):
        settings = {"key": KEY, "num_passes": passes, "block_size": 20}
        warm = residual(
            drifted,
            jlora.randomized_svd(drifted, 12, warm_start=warm_start, **settings),
        )
        cold = residual(drifted, jlora.randomized_svd(drifted, 12, **settings))
        assert warm / best - 1 < 0.5 * (cold / best - 1)


def test_one_pair_of_passes_a_step_follows_a_drifting_matrix():
    a = make_float32("spiked", 240, 200)
    svd = jlora.randomized_svd(a, 12, key=KEY)

    for step in range(8):
        key = jax.random.fold_in(KEY, step)
        a = a + 0.02 * jnp.linalg.norm(a) / 220 * jax.random.normal(
            key, a.shape, a.dtype
        )
        svd = jlora.randomized_svd(a, 12, key=key, warm_start=svd)

    # Ten passes of subspace iteration leave 3e-3 on this spectrum.
    assert residual(a, svd) / optimal_error(a, 12) - 1 < 3e-3
    assert orthonormality(svd.u) < 1e-5


def test_warm_starts_in_batches_and_of_other_ranks():
    a = jnp.stack([make_float32("spiked", 80, 60, layer) for layer in range(2)])
    for rank in (2, 10):
        warm_start = jlora.truncated_svd(a, rank)
        svd = jlora.randomized_svd(a, 4, key=KEY, warm_start=warm_start)
        assert svd.u.shape == (2, 80, 4)


@pytest.mark.wrong_types
def test_wrong_warm_starts_are_refused():
    a = jnp.stack([make_float32("spiked", 80, 60, layer) for layer in range(2)])
    with pytest.raises(
        ValueError, match=r"`warm_start.u` must have shape \(2, 80, 3\)"
    ):
        jlora.randomized_svd(a, 4, key=KEY, warm_start=jlora.truncated_svd(a.mT, 3))
    with pytest.raises(TypeError, match="`warm_start` must be a triple"):
        jlora.randomized_svd(a, 4, key=KEY, warm_start=a)
