"""Steps on the manifold of fixed rank: tangents, retractions, an integrator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import orthonormality
from tests.helpers.dtypes import parametrize_full_dtypes
from tests.helpers.factors import (
    dense,
    make_factors,
    make_svd,
    normal,
    product,
    to_float64,
)

SVD = make_svd(6, 5, 2)


def to_dense(tangent, svd):
    core, left, right = map(to_float64, tangent)
    u, _, vt = map(to_float64, svd)
    return u @ core @ vt + left @ vt + u @ right


@parametrize_full_dtypes
def test_tangent_is_the_orthogonal_projection(dtype):
    def project(gradient):
        return to_dense(jlora.training.project_tangent(svd, gradient), svd)

    svd, gradient = make_svd(12, 9, 3, dtype, (2,)), normal(1, 2, 12, 9, dtype=dtype)
    inside = project(gradient)
    again = project(jnp.asarray(inside, dtype))
    np.testing.assert_allclose(again, inside, atol=1e-5)

    # The remainder is orthogonal to every direction x vt and u y.
    remainder = to_float64(gradient) - inside
    u, _, vt = map(to_float64, svd)
    np.testing.assert_allclose(remainder @ vt.mT, 0, atol=1e-5)
    np.testing.assert_allclose(u.mT @ remainder, 0, atol=1e-5)

    # A gradient given as factors has the same projection as their product.
    factors = make_factors(12, 9, 3, dtype, batch=(2,))
    expected = project(jnp.asarray(product(*factors), dtype))
    np.testing.assert_allclose(project(factors), expected, atol=1e-4)


def test_retraction_is_of_second_order_and_the_nearest():
    svd = make_svd(30, 20, 3)
    tangent = jlora.training.project_tangent(svd, normal(1, 30, 20))
    straight = to_dense(tangent, svd)

    errors = []
    for step in (0.4, 0.2, 0.1):
        retracted = jlora.training.retract(svd, tangent, step)
        assert retracted.s.shape == (3,)
        assert orthonormality(retracted.u) < 1e-5

        target = dense(svd) + step * straight
        u, s, vt = np.linalg.svd(target)
        nearest = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(dense(retracted), nearest, atol=1e-4)
        errors.append(np.linalg.norm(dense(retracted) - target))

    # The next term is of third order: within a quarter of two at these steps.
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(slopes, 2, atol=0.25)
    np.testing.assert_allclose(
        dense(jlora.training.retract(svd, tangent, 0.0)), dense(svd), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(30, 20, 4), (20, 30, 4), (7, 30, 5)], ids=str)
def test_integrator_is_exact_where_the_rank_stays(shape):
    m, n, r = shape
    initial, final = (make_svd(m, n, r, batch=(2,), seed=seed) for seed in range(2))
    change = jnp.asarray(dense(final) - dense(initial), jnp.float32)
    svd, rank = jlora.training.integrate_low_rank(initial, change)
    size = float(final.s.max())
    np.testing.assert_allclose(dense(svd), dense(final), atol=1e-4 * size)
    assert rank.tolist() == [r, r]
    assert orthonormality(svd.u) < 1e-5


def test_integrator_raises_the_rank_to_hold_the_change():
    change = jlora.Factors(normal(1, 30, 2), normal(2, 2, 20))
    grown = jlora.training.integrate_low_rank(
        make_svd(30, 20, 4), change, max_rank=8, tolerance=1e-5
    )
    assert grown.svd.s.shape == (8,)
    assert int(grown.rank) == 6
    assert not np.any(grown.svd.s[6:])


def test_integrator_lowers_the_rank_where_values_fall_below_the_tolerance():
    initial = make_svd(30, 20, 4)
    # The change leaves less than 1e-3 of the norm in three of four directions.
    factors = jnp.array([1.0, 1e-4, 1e-4, 1e-4], initial.s.dtype)
    final = initial._replace(s=initial.s * factors)
    change = jnp.asarray(dense(final) - dense(initial), jnp.float32)
    svd, rank = jlora.training.integrate_low_rank(initial, change, tolerance=1e-2)
    assert int(rank) == 1
    np.testing.assert_allclose(svd.s[0], final.s[0], rtol=1e-5)

    @jax.jit
    def integrate(svd, change, tolerance):
        return jlora.training.integrate_low_rank(svd, change, tolerance=tolerance)

    assert int(integrate(initial, change, 1e-2).rank) == 1


def test_integrator_is_accurate_with_tiny_singular_values():
    initial = make_svd(30, 20, 4)
    tiny = initial._replace(s=jnp.array([1.0, 1e-6, 0.0, 0.0]))
    change = jnp.asarray(dense(make_svd(30, 20, 2, seed=3)), jnp.float32)
    svd, _ = jlora.training.integrate_low_rank(tiny, change)

    # Both spaces together have three directions above rounding. The integrator keeps
    # four.
    expected = dense(tiny) + to_float64(change)
    np.testing.assert_allclose(
        dense(svd), expected, atol=1e-5 * np.linalg.norm(expected)
    )

    bad = jlora.training.integrate_low_rank(tiny, change.at[0, 0].set(jnp.nan))
    assert bool(jnp.isnan(bad.svd.u).all())


def test_descent_along_the_manifold_finds_the_matrix():
    target = dense(make_svd(30, 20, 3, seed=5))
    svd = make_svd(30, 20, 3)
    for _ in range(60):
        gradient = jnp.asarray(dense(svd) - target, jnp.float32)
        svd = jlora.training.retract(
            svd, jlora.training.project_tangent(svd, gradient), -0.5
        )
    assert np.linalg.norm(dense(svd) - target) < 1e-3 * np.linalg.norm(target)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.training.project_tangent(SVD, jnp.ones((5, 6))),
            ValueError,
            r"`gradient` must have shape \(6, 5\)",
        ),
        (
            lambda: jlora.training.project_tangent(SVD, make_factors(6, 4, 2)),
            ValueError,
            r"`gradient.u @ gradient.v` must have shape \(6, 5\)",
        ),
        (
            lambda: jlora.training.retract(SVD, jnp.ones((6, 5))),
            TypeError,
            "`tangent` must be a Tangent",
        ),
        (
            lambda: jlora.training.integrate_low_rank(
                SVD, jnp.ones((6, 5)), max_rank=5
            ),
            ValueError,
            "`max_rank` must be at most 4, got 5",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()
