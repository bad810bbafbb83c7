"""Columns replaced and removed, of factors and of an SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.factors import (
    dense,
    make_factors,
    make_svd,
    normal,
    to_float64,
)
from tests.helpers.updated_svds import (
    check_is_svd_of,
    parametrize_floats,
    parametrize_shapes,
)


@parametrize_floats
@parametrize_shapes
def test_replace_and_remove_columns(shape, dtype):
    m, n, r, k = shape
    svd = make_svd(m, n, r, dtype, (2,))
    c = normal(1, 2, m, k, dtype=dtype)
    columns = np.random.default_rng(0).permutation(n)[:k]

    changed = dense(svd)
    changed[..., columns] = to_float64(c)
    check_is_svd_of(jlora.updates.replace_columns(svd, columns, c), changed)

    remaining = np.delete(dense(svd), columns, axis=-1)
    check_is_svd_of(jlora.updates.remove_columns(svd, columns), remaining)


@pytest.mark.parametrize("columns", [2, slice(0, 2), [3, -5]], ids=str)
def test_set_columns_of_an_svd_gives_an_svd(columns):
    svd = make_svd(30, 20, 4, batch=(2,))
    values = normal(1, 2, 4, 2)
    indices = np.arange(20)[-2:] if isinstance(columns, int) else np.arange(20)[columns]
    v = to_float64(svd.s)[..., None] * to_float64(svd.vt)
    v[..., indices] = values

    changed = jlora.set_columns(svd, columns, values)
    assert changed.s.shape == svd.s.shape
    check_is_svd_of(changed, to_float64(svd.u) @ v)


@pytest.mark.parametrize(
    "columns", [2, slice(1, 3), [0, -1], np.array([4, 2])], ids=str
)
def test_set_columns_changes_only_these(columns):
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


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("columns", "shape", "error", "text"),
    [
        (2, (2, 2), ValueError, r"`values` must have shape \(3, 2\)"),
        (0, (3, 1), ValueError, "`columns` must be at least 1, got 0"),
        (6, (3, 6), ValueError, "`columns` must be at most 5, got 6"),
        ([5], (3, 1), ValueError, r"`columns` must lie in \[-5, 5\), got 5"),
        ([1, -4], (3, 2), ValueError, "each column once"),
        ([], (3, 1), ValueError, "`columns` must name at least one column"),
        ([0.5], (3, 1), TypeError, "`columns` must be an integer k"),
    ],
)
def test_set_columns_refuses(columns, shape, error, text):
    with pytest.raises(error, match=text):
        jlora.set_columns(make_factors(6, 5, 3), columns, jnp.ones(shape))


SVD = make_svd(6, 5, 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.updates.replace_columns(SVD, [5], jnp.ones((6, 1))),
            ValueError,
            r"`columns` must lie in \[-5, 5\), got 5",
        ),
        (
            lambda: jlora.updates.remove_columns(SVD, 5),
            ValueError,
            "must leave at least one of 5 columns",
        ),
        (
            lambda: jax.jit(jlora.updates.remove_columns)(SVD, jnp.array([1])),
            TypeError,
            "`columns` must be static",
        ),
        (
            lambda: jlora.set_columns(SVD, 1, jnp.ones((3, 1))),
            ValueError,
            r"`values` must have shape \(2, 1\)",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
