"""Rows of one batch through different adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.factors import DTYPES

IMPLEMENTATIONS = ["gather", "sort", None]


def make_case(num_rows, num_adapters, m=24, n=18, rank=3, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (num_rows, m), jnp.float32).astype(dtype)
    bank = jlora.Factors(
        jax.random.normal(keys[1], (num_adapters, m, rank), jnp.float32).astype(dtype),
        jax.random.normal(keys[2], (num_adapters, rank, n), jnp.float32).astype(dtype),
    )
    base = jax.random.normal(keys[3], (m, n), jnp.float32).astype(dtype)
    index = jax.random.randint(keys[4], (num_rows,), -1, num_adapters)
    return x, bank, index, base


def expect(x, bank, index, base, scale=1.0):
    x, base, u, v = (np.asarray(part, np.float64) for part in (x, base, *bank))
    scale = np.broadcast_to(scale, len(u))
    rows = [
        row @ base + (scale[i] * (row @ u[i]) @ v[i] if i >= 0 else 0)
        for row, i in zip(x, np.asarray(index), strict=True)
    ]
    return np.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (5, 3), (70, 4), (33, 40), (200, 2)], ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_row_gets_its_adapter(implementation, sizes, dtype):
    x, bank, index, base = make_case(*sizes, dtype=dtype)
    found = jlora.apply_many(
        x, bank, index, base, scale=0.5, implementation=implementation
    )
    expected = expect(x, bank, index, base, 0.5)
    assert found.dtype == dtype
    # As for one adapter: the thin product and the result are rounded to the dtype of x.
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max() + 1e-4
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["one adapter", "none", "one row differs"])
def test_uneven_rows(implementation, kind):
    x, bank, index, base = make_case(90, 5)
    index = {
        "one adapter": jnp.full_like(index, 3),
        "none": jnp.full_like(index, -1),
        "one row differs": jnp.full_like(index, 4).at[17].set(0),
    }[kind]
    found = jlora.apply_many(x, bank, index, base, implementation=implementation)
    np.testing.assert_allclose(found, expect(x, bank, index, base), atol=1e-3)
    delta = jlora.apply_many(x, bank, index, implementation=implementation)
    np.testing.assert_allclose(delta, expect(x, bank, index, 0 * base), atol=1e-3)


@pytest.mark.parametrize("implementation", ["gather", "sort"])
def test_traced_indices_and_batch_axes(implementation):
    x, bank, index, base = make_case(60, 4)

    def run(x, index):
        return jlora.apply_many(x, bank, index, base, implementation=implementation)

    whole = run(x, index)
    np.testing.assert_allclose(jax.jit(run)(x, index), whole, rtol=1e-5, atol=1e-5)
    stacked = run(x.reshape(3, 20, -1), index.reshape(3, 20))
    np.testing.assert_allclose(stacked.reshape(60, -1), whole, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(run)(x.reshape(3, 20, -1), index.reshape(3, 20))
    np.testing.assert_allclose(mapped.reshape(60, -1), whole, rtol=1e-5, atol=1e-4)
    # A traced index cannot be refused; one out of range means no adapter.
    wild = jax.jit(run)(x, index.at[:3].set(jnp.array([4, 99, -7])))
    np.testing.assert_allclose(wild[:3], x[:3] @ base, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(wild[3:], whole[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["gather", "sort"])
def test_gradients_reach_the_adapters_that_were_used(implementation):
    x, bank, index, base = make_case(40, 3)
    index = jnp.where(index == 1, 0, index)
    scale = jnp.array([0.5, 1.0, 2.0], jnp.float32)

    def measure(x, bank, base, scale):
        y = jlora.apply_many(
            x, bank, index, base, scale=scale, implementation=implementation
        )
        return jnp.sum(jnp.sin(y))

    def dense(x, bank, base, scale):
        safe = jnp.maximum(index, 0)
        delta = jnp.einsum(
            "tm,tmr,trn->tn", x, bank.u[safe], bank.v[safe], precision="highest"
        )
        delta = jnp.where((index >= 0)[:, None], scale[safe][:, None] * delta, 0)
        return jnp.sum(jnp.sin(jnp.matmul(x, base, precision="highest") + delta))

    found = jax.grad(measure, (0, 1, 2, 3))(x, bank, base, scale)
    expected = jax.grad(dense, (0, 1, 2, 3))(x, bank, base, scale)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2),
        found,
        expected,
    )
    assert not np.any(found[1].u[1])


def test_nothing_is_expanded_over_all_adapters():
    x, bank, index, base = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((512, 256), jnp.float32),
            ((64, 256, 8), jnp.float32),
            ((512,), jnp.int32),
            ((256, 256), jnp.float32),
        )
    )
    bank = jlora.Factors(bank, jax.ShapeDtypeStruct((64, 8, 256), jnp.float32))

    memory = (
        jax.jit(jlora.apply_many)
        .lower(x, bank, index, base)
        .compile()
        .memory_analysis()
    )
    # The expansion would take 512 * 64 * 256 numbers; this copies an adapter a block.
    assert memory.temp_size_in_bytes < 512 * 64 * 256 * 4 / 4


def test_mixed_ranks_are_padded():
    rng = np.random.default_rng(0)
    each = [
        jlora.Factors(
            jnp.asarray(rng.standard_normal((9, r)), jnp.float32),
            jnp.asarray(rng.standard_normal((r, 7)), jnp.float32),
        )
        for r in (1, 4, 2)
    ]

    bank = jlora.stack_factors(each)
    assert bank.u.shape == (3, 9, 4)

    x = jnp.asarray(rng.standard_normal((3, 9)), jnp.float32)
    found = jlora.apply_many(x, bank, jnp.arange(3))
    for row, one, factors in zip(found, x, each, strict=True):
        np.testing.assert_allclose(
            row, jlora.apply_factors(one, factors), rtol=1e-4, atol=1e-5
        )


def test_which_implementation_is_chosen():
    for sizes, expected in (
        ((8, 16), "gather"),
        ((64, 16), "sort"),
        ((512, 16), "sort"),
        ((64, 64), "gather"),
    ):
        x, bank, index, base = make_case(*sizes)
        chosen = jlora.reconstruction.which_implementation(
            jlora.apply_many, x, bank, index, base
        )
        assert (sizes, chosen) == (sizes, expected)


X, BANK, INDEX, BASE = make_case(6, 2)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.apply_many(X, BANK, INDEX.at[0].set(2)),
            ValueError,
            r"`index` must lie in \[-1, 2\), got 2",
        ),
        (lambda: jlora.apply_many(X, BANK, INDEX.at[0].set(-2)), ValueError, "got -2"),
        (
            lambda: jlora.apply_many(X, BANK, INDEX[:5]),
            ValueError,
            r"`index` must have shape \(6,\)",
        ),
        (
            lambda: jlora.apply_many(X, BANK, INDEX.astype(jnp.float32)),
            TypeError,
            "`index` must be an array of integers, got float32",
        ),
        (lambda: jlora.apply_many(X, BANK, [0] * 6), TypeError, "got list"),
        (lambda: jlora.apply_many(X[:, :5], BANK, INDEX), ValueError, "rows of bank.u"),
        (
            lambda: jlora.apply_many(X, jlora.Factors(BANK.u[0], BANK.v[0]), INDEX),
            ValueError,
            r"`bank` must have u \[a, m, r\]",
        ),
        (
            lambda: jlora.apply_many(X, BANK, INDEX, BASE.T),
            ValueError,
            "`base` must have shape",
        ),
        (
            lambda: jlora.apply_many(X, BANK, INDEX, scale=jnp.ones(3)),
            ValueError,
            r"`scale` must be a number or have shape \(2,\)",
        ),
        (
            lambda: jlora.apply_many(X, BANK, INDEX, implementation="dense"),
            ValueError,
            "`implementation` must be one of 'gather', 'sort'",
        ),
        (lambda: jlora.stack_factors([]), ValueError, "at least one pair"),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["u", "v", "scale", "x"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_values_that_no_row_uses_reach_nothing(where, bad, value, implementation):
    x, bank, _, _ = make_case(8, 3)
    used = [adapter for adapter in range(3) if adapter != bad]
    index = jnp.asarray([used[0], -1, used[1], -1, used[0], -1, -1, used[1]])
    arrays = {"x": x, "u": bank.u, "v": bank.v, "scale": jnp.arange(1.0, 4.0)}
    spoiled = arrays[where].at[1 if where == "x" else bad].set(value)

    def apply(x, u, v, scale):
        bank = jlora.Factors(u, v)
        y = jlora.apply_many(x, bank, index, scale=scale, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    def measure(arrays):
        return jax.value_and_grad(apply, (0, 1, 2, 3))(*arrays.values())

    expected, found = measure(arrays), measure(arrays | {where: spoiled})
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert bool((one == other).all())
    dx, du, dv, dscale = found[1]
    assert bool((dx[index < 0] == 0).all())
    assert all(bool((gradient[bad] == 0).all()) for gradient in (du, dv, dscale))


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (0, 2, 24)], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_give_no_rows(shape, implementation):
    _, bank, _, base = make_case(2, 3)
    y = jlora.apply_many(
        jnp.zeros(shape),
        bank,
        jnp.zeros(shape[:-1], jnp.int32),
        base,
        implementation=implementation,
    )
    assert y.shape == (*shape[:-1], 18)
