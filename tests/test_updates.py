import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

DTYPES = [
    jnp.float32,
    jnp.bfloat16,
    *([jnp.float64] if jax.config.jax_enable_x64 else []),
]


def make_factors(m, n, r, dtype=jnp.float32, batch=()):
    keys = jax.random.split(jax.random.key(0), 2)
    u = jax.random.normal(keys[0], (*batch, m, r), jnp.float32).astype(dtype)
    return jlora.Factors(
        u, jax.random.normal(keys[1], (*batch, r, n), jnp.float32).astype(dtype)
    )


def product(factors):
    return np.asarray(factors.u, np.float64) @ np.asarray(factors.v, np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "shape", [(40, 30, 8), (30, 40, 8), (6, 40, 8), (1, 5, 3)], ids=str
)
def test_recompress_is_the_best_approximation(dtype, shape):
    factors = make_factors(*shape, dtype, batch=(2,))
    rank = min(4, *shape)
    svd = jlora.recompress(factors, rank)
    u, s, vt = np.linalg.svd(product(factors), full_matrices=False)
    best = (u * s[:, None])[..., :rank] @ vt[:, :rank]
    found = (np.asarray(svd.u, np.float64) * np.asarray(svd.s)[:, None]) @ np.asarray(
        svd.vt
    )
    np.testing.assert_allclose(found, best, atol=2e-5 * s.max())
    np.testing.assert_allclose(svd.s, s[:, :rank], rtol=1e-5, atol=1e-5 * s.max())


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(40, 30, 8), (5, 40, 8)], ids=str)
def test_balance_keeps_the_product_and_evens_the_sides(shape, scale):
    factors = make_factors(*shape)
    factors = factors._replace(u=factors.u * scale)
    balanced = jlora.updates.balance(factors)
    assert [part.shape for part in balanced] == [part.shape for part in factors]
    size = np.abs(product(factors)).max()
    np.testing.assert_allclose(product(balanced), product(factors), atol=1e-5 * size)
    left, right = (np.asarray(part, np.float64) for part in balanced)
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-5 * 100 * size)


def test_recompress_gradient_jit_and_vmap():
    factors = make_factors(12, 9, 4)

    def captured(factors):
        svd = jlora.recompress(factors, 2)
        return jnp.sum(svd.s**2)

    u, v = factors
    gradient = jax.grad(captured)(factors)
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


def test_nan_in_a_factor_gives_nan_for_that_matrix_alone():
    factors = make_factors(12, 9, 4, batch=(2,))
    bad = factors._replace(u=factors.u.at[0, 3, 1].set(jnp.nan))
    for result in (jlora.recompress(bad, 2), jlora.updates.balance(bad)):
        assert all(bool(jnp.isnan(part[0]).all()) for part in result)
        assert all(bool(jnp.isfinite(part[1]).all()) for part in result)


@pytest.mark.parametrize(
    "columns", [2, slice(1, 3), [0, -1], np.array([4, 2])], ids=str
)
def test_set_columns_changes_these_alone(columns):
    factors = make_factors(6, 5, 3, batch=(2,))
    values = jnp.full((3, 2), 7.0)
    changed = jlora.set_columns(factors, columns, values)
    indices = np.arange(5)[-2:] if isinstance(columns, int) else np.arange(5)[columns]
    kept = np.setdiff1d(np.arange(5), indices)
    assert bool((changed.v[..., indices] == 7).all())
    assert bool((changed.v[..., kept] == factors.v[..., kept]).all())
    assert changed.u is factors.u


def test_set_columns_under_jit_and_grad():
    factors, values = make_factors(6, 5, 3), jnp.ones((3, 2))
    traced = jax.jit(jlora.set_columns)(factors, jnp.array([1, 3]), values)
    assert bool((traced.v == jlora.set_columns(factors, [1, 3], values).v).all())
    gradient = jax.grad(lambda x: jlora.set_columns(factors, [1, 3], x).v.sum())(values)
    assert bool((gradient == 1).all())


@pytest.mark.parametrize(
    ("columns", "shape", "error", "text"),
    [
        (2, (2, 2), ValueError, r"`values` must have shape \(3, 2\)"),
        (0, (3, 1), ValueError, "`columns` must be at least 1, got 0"),
        (6, (3, 6), ValueError, "`columns` must be at most 5, got 6"),
        ([5], (3, 1), ValueError, r"`columns` must lie in \[-5, 5\), got 5"),
        ([1, -4], (3, 2), ValueError, "each column once"),
        ([], (3, 1), TypeError, "`columns` must be an integer k"),
        ([0.5], (3, 1), TypeError, "`columns` must be an integer k"),
    ],
)
def test_set_columns_refuses(columns, shape, error, text):
    with pytest.raises(error, match=text):
        jlora.set_columns(make_factors(6, 5, 3), columns, jnp.ones(shape))


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
