"""Sums, truncations, balancing and polar factors of products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import orthonormality
from tests.helpers.factors import (
    DTYPES,
    dense,
    make_factors,
    make_svd,
    multiply_out,
    normal,
    product,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "shape", [(40, 30, 8), (30, 40, 8), (6, 40, 8), (1, 5, 3)], ids=str
)
def test_recompress_is_the_best_approximation(dtype, shape):
    factors = make_factors(*shape, dtype, batch=(2,))
    rank = min(4, *shape)
    svd = jlora.recompress(factors, rank)

    u, s, vt = np.linalg.svd(multiply_out(factors), full_matrices=False)
    best = (u * s[:, None])[..., :rank] @ vt[:, :rank]
    found = (np.asarray(svd.u, np.float64) * np.asarray(svd.s)[:, None]) @ np.asarray(
        svd.vt
    )
    np.testing.assert_allclose(found, best, atol=2e-5 * s.max())
    np.testing.assert_allclose(svd.s, s[:, :rank], rtol=1e-5, atol=1e-5 * s.max())


def test_recompress_gradient_jit_and_vmap():
    factors = make_factors(12, 9, 4)

    def measure(factors):
        svd = jlora.recompress(factors, 2)
        return jnp.sum(svd.s**2)

    u, v = factors
    gradient = jax.grad(measure)(factors)
    svd = jlora.recompress(factors, 2)
    best = jnp.matmul(svd.u * svd.s[None], svd.vt, precision="highest")
    # d Σ s² = 2 <best, du v + u dv>
    np.testing.assert_allclose(gradient.u, 2 * best @ v.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradient.v, 2 * u.T @ best, rtol=1e-3, atol=1e-3)

    batch = make_factors(12, 9, 4, batch=(3,))
    mapped = jax.vmap(lambda f: jlora.recompress(f, 2).s)(batch)
    np.testing.assert_allclose(
        mapped, jax.jit(jlora.recompress, static_argnums=1)(batch, 2).s, rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_recompress_with_a_key_is_near_the_optimum(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    decay = jnp.arange(1, 301, dtype=jnp.float32) ** -0.5
    factors = jlora.Factors(
        jax.random.normal(keys[0], (700, 300), jnp.float32) * decay[None],
        jax.random.normal(keys[1], (300, 600), jnp.float32),
    )

    svd = jlora.recompress(factors, 8, key=keys[2])
    exact = np.linalg.svd(product(*factors), compute_uv=False)
    excess = (
        np.linalg.norm(product(*factors) - dense(svd)) / np.linalg.norm(exact[8:]) - 1
    )
    assert -1e-6 < excess < 1e-4
    assert orthonormality(svd.u) < 1e-5

    with pytest.raises(TypeError, match="must not be differentiated"):
        jax.grad(
            lambda u: jlora.recompress(factors._replace(u=u), 8, key=keys[2]).s.sum()
        )(factors.u)


@pytest.mark.parametrize("condition", [1e6, 1e9])
def test_nearly_dependent_factors_keep_full_accuracy(condition):
    rng = np.random.default_rng(0)
    mix = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    decay = condition ** -np.linspace(0, 1, 8)
    u = (np.linalg.qr(rng.standard_normal((60, 8)))[0] * decay) @ mix
    v = mix.T @ (decay[::-1, None] * np.linalg.qr(rng.standard_normal((50, 8)))[0].T)

    factors = jlora.Factors(jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32))
    svd = jlora.recompress(factors, 8)
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5

    # The sums that make up the product are of at most |u| |v| each, and round by eps.
    size = np.linalg.norm(u, 2) * np.linalg.norm(v, 2)
    np.testing.assert_allclose(dense(svd), product(*factors), atol=1e-5 * size)


def test_nan_in_a_factor_gives_nan_for_that_matrix_only():
    factors = make_factors(12, 9, 4, batch=(2,))
    bad = factors._replace(u=factors.u.at[0, 3, 1].set(jnp.nan))
    for result in (jlora.recompress(bad, 2), jlora.updates.balance(bad)):
        assert all(bool(jnp.isnan(part[0]).all()) for part in result)
        assert all(bool(jnp.isfinite(part[1]).all()) for part in result)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(40, 30, 8), (5, 40, 8)], ids=str)
def test_balance_keeps_the_product_and_evens_the_sides(shape, scale):
    factors = make_factors(*shape)
    factors = factors._replace(u=factors.u * scale)
    balanced = jlora.updates.balance(factors)
    assert [part.shape for part in balanced] == [part.shape for part in factors]
    size = np.abs(multiply_out(factors)).max()
    np.testing.assert_allclose(
        multiply_out(balanced), multiply_out(factors), atol=1e-5 * size
    )
    left, right = (np.asarray(part, np.float64) for part in balanced)
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-5 * 100 * size)


def test_concatenated_factors_are_the_weighted_sum():
    pairs = [
        jlora.Factors(normal(i, 2, 12, i + 1), normal(9 + i, 2, i + 1, 7))
        for i in range(3)
    ]
    weights = [0.5, -1.0, 2.0]
    expected = sum(w * product(*pair) for w, pair in zip(weights, pairs, strict=True))

    for given in (weights, jnp.asarray(weights)):
        both = jlora.concatenate_factors(pairs, given)
        assert both.u.shape == (2, 12, 6)
        np.testing.assert_allclose(product(*both), expected, atol=1e-5)

    traced = jax.jit(jlora.concatenate_factors)(pairs, jnp.asarray(weights))
    np.testing.assert_allclose(product(*traced), expected, atol=1e-5)

    gradient = jax.grad(lambda w: jnp.sum(jlora.concatenate_factors(pairs, w).u))(
        jnp.asarray(weights)
    )
    sums = [float(pair.u.sum()) for pair in pairs]
    np.testing.assert_allclose(gradient, sums, rtol=1e-4, atol=1e-4)


def test_bfloat16_factors_are_summed_in_float32():
    x, y = normal(1, 40, 2, dtype=jnp.bfloat16), normal(2, 2, 30, dtype=jnp.bfloat16)
    both = jlora.concatenate_factors([jlora.Factors(x, y)] * 2)
    assert both.u.dtype == jnp.float32
    summed = jlora.recompress(both, 2)
    np.testing.assert_allclose(
        dense(summed), 2 * product(x, y), atol=1e-5 * float(summed.s[0])
    )


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(30, 20, 4), (20, 30, 4), (5, 30, 8)], ids=str)
def test_orthogonalized_product_is_the_polar_factor(shape, scale):
    m, n, r = shape
    u, v = normal(0, 2, m, r), scale * normal(1, 2, r, n)
    polar = jlora.updates.orthogonalize_product(jlora.Factors(u, v))
    left, s, right = np.linalg.svd(product(u, v), full_matrices=False)

    kept = min(m, n, r)
    # Rounding rotates the vectors of the smallest value by eps σ_1 / σ_r.
    tolerance = 1e-5 * np.max(s[..., 0] / s[..., kept - 1])
    np.testing.assert_allclose(
        product(*polar), left[..., :kept] @ right[..., :kept, :], atol=tolerance
    )
    assert [part.shape for part in polar] == [(2, m, r), (2, r, n)]


def test_orthogonalized_product_has_zeros_in_missing_directions():
    u = normal(0, 30, 4)
    factors = jlora.Factors(u.at[:, 3].set(u[:, 2]), normal(1, 4, 20).at[3].set(0.0))
    s = np.linalg.svd(
        product(*jlora.updates.orthogonalize_product(factors)), compute_uv=False
    )
    np.testing.assert_allclose(s[:4], [1, 1, 1, 0], atol=1e-5)

    zero = jlora.updates.orthogonalize_product(jlora.Factors(0 * u, normal(1, 4, 20)))
    assert not np.any(product(*zero))

    bad = jlora.updates.orthogonalize_product(
        factors._replace(u=factors.u.at[0, 0].set(jnp.nan))
    )
    assert all(bool(jnp.isnan(part).all()) for part in bad)


@pytest.mark.wrong_types
def test_factors_that_do_not_fit():
    bad = jlora.Factors(jnp.ones((4, 3)), jnp.ones((2, 5)))
    for call in (
        jlora.updates.balance,
        lambda f: jlora.recompress(f, 1),
        jlora.reconstruct,
    ):
        with pytest.raises(
            ValueError, match=r"`factors` must have u .* \(4, 3\) and \(2, 5\)"
        ):
            call(bad)

    with pytest.raises(TypeError, match="`factors` must be a pair"):
        jlora.updates.balance(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="`rank` must be at most 3, got 4"):
        jlora.recompress(make_factors(6, 5, 3), 4)


SVD = make_svd(6, 5, 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.concatenate_factors([]),
            ValueError,
            "at least one pair, got none",
        ),
        (
            lambda: jlora.concatenate_factors([(SVD.u, SVD.vt), (SVD.u[1:], SVD.vt)]),
            ValueError,
            r"`factors\[1\].u` must have shape \(6, 2\)",
        ),
        (
            lambda: jlora.concatenate_factors([(SVD.u, SVD.vt)], [1.0, 2.0]),
            ValueError,
            "`weights` must hold one number for each of 1 factors, got 2",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
