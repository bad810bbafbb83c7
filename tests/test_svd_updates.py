"""Updates of an SVD and sums of factors, against dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import orthonormality

DTYPES = [
    jnp.float32,
    jnp.bfloat16,
    *([jnp.float64] if jax.config.jax_enable_x64 else []),
]
# rows, columns, rank, width of the update; in the last three there is no room for new directions.
SHAPES = [(40, 30, 5, 3), (30, 40, 5, 1), (9, 40, 8, 3), (40, 6, 6, 2), (1, 5, 1, 2)]
parametrize_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make_svd(m, n, r, dtype=jnp.float32, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, m, r)) @ rng.standard_normal((*batch, r, n))
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    parts = u[..., :r], s[..., :r], vt[..., :r, :]
    return jlora.SVD(*(jnp.asarray(part, jnp.float32).astype(dtype) for part in parts))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def to_float64(array):
    return np.asarray(array, np.float64)


def dense(svd):
    u, s, vt = map(to_float64, svd)
    return (u * s[..., None, :]) @ vt


def product(x, y):
    return to_float64(x) @ to_float64(y)


def check_is_svd_of(svd, expected):
    """Check the identity, the singular values, and that it is an SVD."""
    exact = np.linalg.svd(expected, compute_uv=False)
    size = max(exact.max(), np.finfo(np.float32).tiny)
    rank = svd.s.shape[-1]
    assert not np.any(exact[..., rank:] > 1e-5 * size)  # nothing had to be cut
    np.testing.assert_allclose(dense(svd), expected, atol=1e-5 * size)
    np.testing.assert_allclose(svd.s, exact[..., :rank], atol=5e-6 * size)
    assert np.all(np.diff(to_float64(svd.s)) <= 0)
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5


# bfloat16 vectors are orthonormal to 4e-3 only, and the updates take them for orthonormal.
FLOATS = [dtype for dtype in DTYPES if dtype != jnp.bfloat16]
parametrize_floats = pytest.mark.parametrize(
    "dtype", FLOATS, ids=lambda dtype: dtype.__name__
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
    left = np.delete(dense(svd), columns, axis=-1)
    check_is_svd_of(jlora.updates.remove_columns(svd, columns), left)


@pytest.mark.parametrize("columns", [2, slice(0, 2), [3, -5]], ids=str)
def test_set_columns_of_an_svd_keeps_it_one(columns):
    svd = make_svd(30, 20, 4, batch=(2,))
    values = normal(1, 2, 4, 2)
    v = to_float64(svd.s)[..., None] * to_float64(svd.vt)
    v[
        ..., np.arange(20)[-2:] if isinstance(columns, int) else np.arange(20)[columns]
    ] = values
    changed = jlora.set_columns(svd, columns, values)
    assert changed.s.shape == svd.s.shape
    check_is_svd_of(changed, to_float64(svd.u) @ v)


def test_bfloat16_is_computed_in_float32():
    svd = make_svd(40, 30, 3, jnp.bfloat16)
    x, y = normal(1, 40, 2, dtype=jnp.bfloat16), normal(2, 2, 30, dtype=jnp.bfloat16)
    more = jlora.updates.add_low_rank(svd, x, y)
    assert more.s.dtype == jnp.float32
    # The error is that of u and vt, 2⁻⁸ from orthonormal ones, however exact the update is.
    expected = dense(svd) + product(x, y)
    assert np.linalg.norm(dense(more) - expected) < 2**-6 * np.linalg.norm(expected)
    both = [jlora.Factors(x, y)] * 2
    assert jlora.concatenate_factors(both).u.dtype == jnp.float32
    summed = jlora.recompress(jlora.concatenate_factors(both), 2)
    np.testing.assert_allclose(
        dense(summed), 2 * product(x, y), atol=1e-5 * float(summed.s[0])
    )


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_cut_is_the_best_approximation(rank):
    svd, x, y = make_svd(40, 30, 5), normal(1, 40, 3), normal(2, 3, 30)
    u, s, vt = np.linalg.svd(dense(svd) + product(x, y), full_matrices=False)
    cut = jlora.updates.add_low_rank(svd, x, y, rank=rank)
    assert cut.u.shape == (40, rank)
    np.testing.assert_allclose(
        dense(cut), (u * s)[:, :rank] @ vt[:rank], atol=2e-5 * s[0]
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
    # All terms lie in one space of r rows and columns, so that nothing is cut along the way.
    left, right = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    xs = (rng.standard_normal((2000, 1, r)) @ left.T).astype(np.float32)
    ys = (rng.standard_normal((2000, 1, r)) @ right.T).astype(np.float32)
    start = jlora.SVD(
        *(jnp.asarray(part, jnp.float32) for part in (left, np.ones(r), right.T))
    )

    @jax.jit
    def run(svd, xs, ys):
        def step(svd, term):
            x, y = term
            return jlora.updates.add_low_rank(svd, x.mT, y, rank=r), None

        return jax.lax.scan(step, svd, (xs, ys))[0]

    svd = run(start, xs, ys)
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5
    expected = left @ right.T + np.einsum("kim,kin->mn", to_float64(xs), to_float64(ys))
    # Each step rounds by a few eps of the sum so far; they add up as a random walk at best.
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
    # Signs are fixed, so that vectors may be compared.
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
    svd, x, y = (
        make_svd(20, 15, 4, batch=(2,)),
        normal(1, 2, 20, 2),
        normal(2, 2, 2, 15),
    )
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


def make_compiled(name):
    m = n = 1024
    shapes = {
        "u": (m, 16),
        "s": (16,),
        "vt": (16, n),
        "x": (m, 4),
        "y": (4, n),
        "wide": (m, 200),
        "high": (200, n),
    }
    arrays = {
        key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()
    }
    svd = jlora.SVD(arrays["u"], arrays["s"], arrays["vt"])
    factors = jlora.Factors(arrays["wide"], arrays["high"])
    functions = {
        "add_low_rank": (jlora.updates.add_low_rank, svd, arrays["x"], arrays["y"]),
        "append_columns": (jlora.updates.append_columns, svd, arrays["x"]),
        "append_rows": (jlora.updates.append_rows, svd, arrays["y"]),
        "replace_columns": (
            lambda svd, c: jlora.updates.replace_columns(svd, 4, c),
            svd,
            arrays["x"],
        ),
        "remove_columns": (lambda svd: jlora.updates.remove_columns(svd, 4), svd),
        "recompress": (lambda factors: jlora.recompress(factors, 8), factors),
        "recompress with a key": (
            lambda factors: jlora.recompress(factors, 8, key=jax.random.key(0)),
            factors,
        ),
        "balance": (jlora.updates.balance, factors),
        "orthogonalize_product": (jlora.updates.orthogonalize_product, factors),
        "integrate_low_rank": (
            lambda svd, x, y: jlora.training.integrate_low_rank(
                svd, jlora.Factors(x, y)
            ),
            svd,
            arrays["x"],
            arrays["y"],
        ),
    }
    function, *arguments = functions[name]
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize(
    "name",
    [
        "add_low_rank",
        "append_columns",
        "append_rows",
        "replace_columns",
        "remove_columns",
        "recompress",
        "recompress with a key",
        "balance",
        "orthogonalize_product",
        "integrate_low_rank",
    ],
)
def test_no_update_forms_the_matrix(name):
    compiled = make_compiled(name)
    assert "f32[1024,1024]" not in compiled.as_text()
    # Of factors of rank 200 a few copies are as large as the matrix; of the others nothing is.
    most = 6 if name.startswith(("recompress", "balance", "orthogonalize")) else 1
    assert compiled.memory_analysis().temp_size_in_bytes < most * 4 * 1024 * 1024


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
    # Rounding of the sums that make up the product, each of at most |u| |v|.
    size = np.linalg.norm(u, 2) * np.linalg.norm(v, 2)
    np.testing.assert_allclose(dense(svd), product(*factors), atol=1e-5 * size)


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


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(30, 20, 4), (20, 30, 4), (5, 30, 8)], ids=str)
def test_orthogonalized_product_is_the_polar_factor(shape, scale):
    m, n, r = shape
    u, v = normal(0, 2, m, r), scale * normal(1, 2, r, n)
    polar = jlora.updates.orthogonalize_product(jlora.Factors(u, v))
    left, s, right = np.linalg.svd(product(u, v), full_matrices=False)
    kept = min(m, n, r)
    # Rounding turns the vectors of the smallest value by eps σ_1 / σ_r.
    room = 1e-5 * np.max(s[..., 0] / s[..., kept - 1])
    np.testing.assert_allclose(
        product(*polar), left[..., :kept] @ right[..., :kept, :], atol=room
    )
    assert [part.shape for part in polar] == [(2, m, r), (2, r, n)]


def test_orthogonalized_product_leaves_out_what_is_not_there():
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


SVD = make_svd(6, 5, 2)


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
