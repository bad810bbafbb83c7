"""SVDs to a tolerance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import residual
from tests.helpers.matrices import X64, make_float32

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("spectrum", "tolerance"),
    [
        ("exponential", 0.5),
        ("exponential", 0.01),
        ("exponential", 1e-4),
        ("spiked", 0.9),
        ("low rank plus noise", 0.1),
        ("rank 5", 0.1),
        ("rank 5", 1e-4),
        ("zero", 0.1),
        ("huge", 0.9),
        ("tiny", 0.9),
    ],
)
@pytest.mark.parametrize("shape", [(500, 420), (420, 500), (60, 50)], ids=str)
def test_adaptive_svd_meets_its_tolerance_with_few_triplets(spectrum, tolerance, shape):
    a = make_float32(spectrum, *shape)
    result = jlora.adaptive_svd(a, tolerance=tolerance, max_rank=45, key=KEY)
    svd, rank = result
    norm = np.linalg.norm(np.asarray(a, np.float64))

    assert svd.u.shape == (shape[0], 45)
    assert bool(result.is_reached)
    assert residual(a, svd) <= tolerance * norm
    assert bool((svd.s[int(rank) :] == 0).all())

    s = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    least = next(
        k for k in range(len(s) + 1) if np.linalg.norm(s[k:]) <= tolerance * norm
    )
    assert least <= int(rank) <= least + 2


def test_adaptive_svd_says_when_it_cannot():
    flat = make_float32("flat", 300, 260)
    svd, rank = result = jlora.adaptive_svd(flat, tolerance=0.1, max_rank=9, key=KEY)
    assert (int(rank), svd.s.shape, bool(result.is_reached)) == (9, (9,), False)
    true = residual(flat, svd) / np.linalg.norm(np.asarray(flat, np.float64))
    assert float(result.error) == pytest.approx(true, rel=0.05)

    if not X64:
        # float32 resolves no such error, though the matrix has a rank of only 5.
        thin = make_float32("rank 5", 300, 260)
        assert not bool(
            jlora.adaptive_svd(thin, tolerance=1e-7, max_rank=9, key=KEY).is_reached
        )


def test_adaptive_svd_of_a_batch_and_of_nan():
    a = jnp.stack(
        [make_float32(name, 300, 260) for name in ("exponential", "rank 5", "spiked")]
    )
    a = a.at[2, 0, 0].set(jnp.nan)
    result = jax.jit(
        lambda a: jlora.adaptive_svd(a, tolerance=0.1, max_rank=30, key=KEY)
    )(a)

    assert result.rank.tolist()[:2] in ([11, 5], [10, 5])
    assert result.is_reached.tolist() == [True, True, False]
    assert bool(jnp.isnan(result.svd.u[2]).all())
    assert bool(jnp.isfinite(result.svd.u[:2]).all())


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tolerance": 0.0}, ValueError, r"`tolerance` must lie in \(0, 1\), got 0.0"),
        ({"tolerance": "x"}, TypeError, "`tolerance` must be a Python number"),
        ({"max_rank": 21}, ValueError, r"`max_rank` must be at most min\(m, n\) = 20"),
    ],
)
def test_adaptive_svd_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        jlora.adaptive_svd(
            jnp.ones((30, 20)),
            **{"tolerance": 0.1, "max_rank": 5, "key": KEY, **arguments},
        )
