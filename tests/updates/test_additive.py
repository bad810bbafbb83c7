"""Low-rank terms, columns and rows added to an SVD, against dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import orthonormality
from tests.helpers.factors import (
    dense,
    make_svd,
    normal,
    product,
    to_float64,
)
from tests.helpers.updated_svds import (
    check_is_svd_of,
    parametrize_floats,
    parametrize_shapes,
)


@parametrize_floats
@parametrize_shapes
def test_add_low_rank(shape, dtype):
    m, n, r, b = shape
    svd = make_svd(m, n, r, dtype, (2,))
    x, y = normal(1, 2, m, b, dtype=dtype), normal(2, 2, b, n, dtype=dtype)

    more = jlora.updates.add_low_rank(svd, x, y)
    assert more.s.dtype == dtype
    assert more.s.shape == (2, min(m, n, r + b))
    check_is_svd_of(more, dense(svd) + product(x, y))


@parametrize_floats
@parametrize_shapes
def test_append_columns_and_rows(shape, dtype):
    m, n, r, k = shape
    svd = make_svd(m, n, r, dtype, (2,))
    c, rows = normal(1, 2, m, k, dtype=dtype), normal(2, 2, k, n, dtype=dtype)

    wider = np.concatenate([dense(svd), to_float64(c)], axis=-1)
    check_is_svd_of(jlora.updates.append_columns(svd, c), wider)

    taller = np.concatenate([dense(svd), to_float64(rows)], axis=-2)
    check_is_svd_of(jlora.updates.append_rows(svd, rows), taller)


def test_bfloat16_is_computed_in_float32():
    svd = make_svd(40, 30, 3, jnp.bfloat16)
    x, y = normal(1, 40, 2, dtype=jnp.bfloat16), normal(2, 2, 30, dtype=jnp.bfloat16)
    more = jlora.updates.add_low_rank(svd, x, y)
    assert more.s.dtype == jnp.float32
    # The update is exact, but u and vt enter it 2⁻⁸ away from orthonormal ones.
    expected = dense(svd) + product(x, y)
    assert np.linalg.norm(dense(more) - expected) < 2**-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_truncated_update_is_the_best_approximation(rank):
    svd, x, y = make_svd(40, 30, 5), normal(1, 40, 3), normal(2, 3, 30)
    u, s, vt = np.linalg.svd(dense(svd) + product(x, y), full_matrices=False)
    truncated = jlora.updates.add_low_rank(svd, x, y, rank=rank)
    assert truncated.u.shape == (40, rank)
    np.testing.assert_allclose(
        dense(truncated), (u * s)[:, :rank] @ vt[:rank], atol=2e-5 * s[0]
    )


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", ["inside", "zero", "cancels", "dependent", "zero svd"])
def test_terms_that_add_no_direction(kind, scale):
    svd = make_svd(40, 30, 4)
    svd = svd._replace(s=svd.s * (0 if kind == "zero svd" else scale))
    x, y = normal(1, 40, 3), scale * normal(2, 3, 30)

    if kind == "inside":
        x, y = svd.u[:, :3], scale * svd.vt[:3]
    elif kind == "zero":
        x = jnp.zeros_like(x)
    elif kind == "cancels":
        x, y = svd.u * svd.s[None], -svd.vt
    elif kind == "dependent":
        x = jnp.repeat(x[:, :1], 3, axis=1)

    more = jlora.updates.add_low_rank(svd, x, y)
    size = max(float(svd.s[0]), np.linalg.norm(product(x, y)))
    np.testing.assert_allclose(
        dense(more), dense(svd) + product(x, y), atol=1e-5 * size
    )
    assert orthonormality(more.u) < 1e-5
    assert orthonormality(more.vt.mT) < 1e-5


def test_two_thousand_updates_do_not_drift():
    m, n, r = 60, 50, 6
    rng = np.random.default_rng(0)
    # All terms lie in one space of r rows and columns, so that no step truncates any
    # of them.
    left, right = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    xs = (rng.standard_normal((2000, 1, r)) @ left.T).astype(np.float32)
    ys = (rng.standard_normal((2000, 1, r)) @ right.T).astype(np.float32)
    initial = jlora.SVD(
        *(jnp.asarray(part, jnp.float32) for part in (left, np.ones(r), right.T))
    )

    @jax.jit
    def run(svd, xs, ys):
        def step(svd, term):
            x, y = term
            return jlora.updates.add_low_rank(svd, x.mT, y, rank=r), None

        return jax.lax.scan(step, svd, (xs, ys))[0]

    svd = run(initial, xs, ys)
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5
    expected = left @ right.T + np.einsum("kim,kin->mn", to_float64(xs), to_float64(ys))
    # Each step rounds by a few eps of the sum so far. At best these errors add up like
    # a random walk.
    error = np.linalg.norm(dense(svd) - expected) / np.linalg.norm(expected)
    assert error < 2000 * np.finfo(np.float32).eps


def test_transforms_of_updates():
    svd = make_svd(20, 15, 4, batch=(3,))
    x, y = normal(1, 3, 20, 2), normal(2, 3, 2, 15)
    whole = jlora.updates.add_low_rank(svd, x, y)
    jitted = jax.jit(jlora.updates.add_low_rank)(svd, x, y)
    mapped = jax.vmap(jlora.updates.add_low_rank)(svd, x, y)
    for part, other, third in zip(whole, jitted, mapped, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-5)
        np.testing.assert_allclose(part, third, atol=1e-5)

    loop = [
        jlora.updates.add_low_rank(
            *jax.tree.map(lambda part, i=i: part[i], (svd, x, y))
        )
        for i in range(3)
    ]
    # The signs follow a rule, so that vectors may be compared.
    np.testing.assert_allclose(whole.u, jnp.stack([one.u for one in loop]), atol=2e-5)


def test_gradient_of_an_update():
    svd, x, y = make_svd(12, 9, 3), normal(1, 12, 2), normal(2, 2, 9)

    def measure(x, y):
        return jnp.sum(jlora.updates.add_low_rank(svd, x, y).s ** 2)

    gradients = jax.grad(measure, (0, 1))(x, y)

    total = dense(svd) + product(x, y)  # d Σ s² = d ‖total‖²
    scale = np.abs(total).max()
    np.testing.assert_allclose(
        gradients[0], 2 * total @ to_float64(y).T, atol=1e-3 * scale
    )
    np.testing.assert_allclose(
        gradients[1], 2 * to_float64(x).T @ total, atol=1e-3 * scale
    )


def test_nan_stays_in_its_matrix():
    svd = make_svd(20, 15, 4, batch=(2,))
    x, y = normal(1, 2, 20, 2), normal(2, 2, 2, 15)
    x = x.at[0, 3, 1].set(jnp.nan)
    more = jlora.updates.add_low_rank(svd, x, y)
    assert all(bool(jnp.isnan(part[0]).all()) for part in more)
    assert all(bool(jnp.isfinite(part[1]).all()) for part in more)


def test_signs_follow_the_rule():
    svd = make_svd(20, 15, 4, batch=(2,))
    flipped = jlora.SVD(-svd.u, svd.s, -svd.vt)
    for fixed in map(jlora.factors.fix_signs, (svd, flipped)):
        largest = np.take_along_axis(
            to_float64(fixed.u), np.abs(fixed.u).argmax(-2, keepdims=True), -2
        )
        assert (largest > 0).all()
        np.testing.assert_allclose(dense(fixed), dense(svd), atol=1e-6)

    for result in (
        jlora.updates.add_low_rank(svd, svd.u, svd.vt),
        jlora.recompress(jlora.Factors(svd.u, svd.vt), 2),
    ):
        fixed = jlora.factors.fix_signs(result)
        assert all(
            bool((part == other).all())
            for part, other in zip(result, fixed, strict=True)
        )


SVD = make_svd(6, 5, 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.updates.add_low_rank(SVD.u, SVD.u, SVD.vt),
            TypeError,
            "`svd` must be a triple",
        ),
        (
            lambda: jlora.updates.add_low_rank(SVD, jnp.ones((5, 1)), jnp.ones((1, 5))),
            ValueError,
            r"`x` must have shape \(6, 1\) \(the rows of svd.u\), got \(5, 1\)",
        ),
        (
            lambda: jlora.updates.add_low_rank(SVD, jnp.ones((6, 1)), jnp.ones((2, 5))),
            ValueError,
            r"`y` must have shape \(1, 5\)",
        ),
        (
            lambda: jlora.updates.add_low_rank(
                SVD, jnp.ones((6, 1)), jnp.ones((1, 5)), rank=4
            ),
            ValueError,
            "`rank` must be at most 3, got 4",
        ),
        (
            lambda: jlora.updates.append_columns(SVD, jnp.ones((5, 1))),
            ValueError,
            r"`c` must have shape \(6, 1\)",
        ),
        (
            lambda: jlora.updates.append_rows(SVD, jnp.ones((1, 6))),
            ValueError,
            r"`rows` must have shape \(1, 5\)",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
