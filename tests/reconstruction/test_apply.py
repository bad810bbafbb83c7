"""Products with an adapted weight that make no dense delta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.factors import DTYPES, make_factors, multiply_out
from tests.helpers.merges import make_base

SHAPES = [(1, 1), (7, 5), (129, 257), (300, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 1)], ids=str)
def test_apply_factors_against_float64(dtype, shape, rank):
    factors, base = make_factors(*shape, rank, dtype), make_base(shape, dtype)
    x = jax.random.normal(jax.random.key(6), (2, 4, shape[0]), jnp.float32).astype(
        dtype
    )

    weight = np.asarray(base, np.float64) + 0.5 * multiply_out(factors)
    expected = np.asarray(x, np.float64) @ weight
    found = jlora.apply_factors(x, factors, base, scale=0.5)
    assert found.dtype == dtype
    # Rounding of the thin product to the dtype of x, then of the result: some eps of
    # its size.
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max() + 1e-4
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)

    vector = jlora.apply_factors(x[0, 0], factors, base, scale=0.5)
    np.testing.assert_allclose(
        np.asarray(vector, np.float64),
        np.asarray(found[0, 0], np.float64),
        atol=tolerance,
    )


def test_gradients_equal_gradients_of_the_dense_weight():
    factors, base = make_factors(6, 5, 3), make_base((6, 5), jnp.float32)
    x = make_base((4, 6), jnp.float32)

    def dense(x, u, v, base, scale):
        return jnp.sum(jnp.sin(x @ (base + scale * (u @ v))))

    def thin(x, u, v, base, scale):
        return jnp.sum(
            jnp.sin(jlora.apply_factors(x, jlora.Factors(u, v), base, scale=scale))
        )

    def rebuilt(x, u, v, base, scale):
        return jnp.sum(
            jnp.sin(x @ jlora.reconstruct(jlora.Factors(u, v), base, scale=scale))
        )

    arguments = (x, *factors, base, jnp.float32(0.3))
    expected = jax.grad(dense, argnums=range(5))(*arguments)
    for way in (thin, rebuilt):
        for one, other in zip(
            jax.grad(way, argnums=range(5))(*arguments), expected, strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def count_backward_flops(measure, trained):
    """Return the flops of a gradient, and of the same function without one."""
    gradient = jax.jit(jax.value_and_grad(measure)).lower(trained).compile()
    return gradient.cost_analysis()["flops"], (
        jax.jit(measure).lower(trained).compile().cost_analysis()["flops"]
    )


def test_a_trained_slice_of_v_costs_its_columns_backward():
    factors, x = make_factors(64, 512, 8), make_base((128, 64), jnp.float32)
    u, v = factors
    weights = make_base((128, 512), jnp.float32)

    def measure(tail, columns):
        whole = jnp.concatenate([v[:, : -tail.shape[-1]], tail], axis=-1)
        y = jlora.apply_factors(x, jlora.Factors(u, whole), num_columns=columns)
        return jnp.vdot(y, weights)

    tail = v[:, -16:]
    gradient = jax.grad(measure)(tail, 16)
    np.testing.assert_allclose(
        gradient, jax.grad(measure)(tail, None), rtol=1e-4, atol=1e-3
    )
    flops, forward = count_backward_flops(lambda tail: measure(tail, 16), tail)
    assert flops - forward < 2.5 * 2 * 128 * 8 * 16
    assert not np.any(
        jax.grad(
            lambda v: jnp.vdot(
                jlora.apply_factors(x, jlora.Factors(u, v), num_columns=16), weights
            )
        )(v)[:, :-16]
    )
    with pytest.raises(ValueError, match="`num_columns` must be at most 512, got 513"):
        jlora.apply_factors(x, factors, num_columns=513)


def test_no_gradient_is_computed_that_nobody_asks_for():
    factors, x = make_factors(64, 32, 8), make_base((128, 64), jnp.float32)
    base = make_base((64, 32), jnp.float32)

    def measure(v):
        return jnp.sum(jlora.apply_factors(x, factors._replace(v=v), base) ** 2)

    flops, forward = count_backward_flops(measure, factors.v)
    # The gradient of v is one product with the thin activations, and elementwise work.
    assert flops - forward < 1.5 * 2 * 128 * 8 * 32


def test_second_derivatives_of_apply_factors():
    (u, v), x = make_factors(4, 3, 2), make_base((5, 4), jnp.float32)
    base = make_base((4, 3), jnp.float32)

    def thin(x, u, v):
        return jnp.sum(
            jnp.sin(jlora.apply_factors(x, jlora.Factors(u, v), base, scale=0.5))
        )

    def dense(x, u, v):
        return jnp.sum(jnp.sin(x @ (base + 0.5 * u @ v)))

    found, expected = (
        jax.hessian(function, (0, 1, 2))(x, u, v) for function in (thin, dense)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        found,
        expected,
    )
    ones = jax.tree.map(jnp.ones_like, (x, u, v))
    for one, other in zip(
        jax.jvp(thin, (x, u, v), ones), jax.jvp(dense, (x, u, v), ones), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_low_precision_errs_at_most_twice_as_much_as_plain_jax():
    u, v = make_factors(129, 65, 16, jnp.bfloat16)
    base, x = make_base((129, 65), jnp.bfloat16), make_base((33, 129), jnp.bfloat16)
    exact = np.asarray(base, np.float64) + multiply_out(jlora.Factors(u, v))
    factors = jlora.Factors(u, v)

    def measure(found, expected):
        return np.linalg.norm(np.asarray(found, np.float64) - expected)

    assert measure(jlora.reconstruct(factors, base), exact) <= 2 * measure(
        base + u @ v, exact
    )
    expected = np.asarray(x, np.float64) @ exact
    plain = x @ base + (x @ u) @ v
    assert measure(jlora.apply_factors(x, factors, base), expected) <= 2 * measure(
        plain, expected
    )


def test_jit_and_vmap_equal_the_loop():
    factors, base = (
        make_factors(6, 5, 3, batch=(3,)),
        make_base((6, 5), jnp.float32, (3,)),
    )
    x = make_base((4, 6), jnp.float32, (3,))

    for call in (
        lambda x, f, b: jlora.apply_factors(x, f, b, scale=0.5),
        lambda x, f, b: jlora.reconstruct(f, b, scale=0.5),
    ):
        loop = jnp.stack(
            [
                call(x[i], jax.tree.map(lambda a, i=i: a[i], factors), base[i])
                for i in range(3)
            ]
        )
        for way in (call, jax.jit(call), jax.vmap(call)):
            np.testing.assert_allclose(
                way(x, factors, base), loop, rtol=1e-5, atol=1e-5
            )


@pytest.mark.wrong_types
def test_shapes_that_do_not_fit():
    factors = make_factors(6, 5, 3)
    with pytest.raises(ValueError, match=r"`base` must have shape \(6, 5\)"):
        jlora.reconstruct(factors, jnp.ones((5, 6)))
    with pytest.raises(ValueError, match=r"`base` must have shape \(6, 5\)"):
        jlora.apply_factors(jnp.ones((2, 6)), factors, jnp.ones((5, 6)))

    with pytest.raises(ValueError, match=r"`x` must have shape \[..., 6\]"):
        jlora.apply_factors(jnp.ones((2, 5)), factors)
    with pytest.raises(
        TypeError, match="`base` must have a real floating dtype, got int32"
    ):
        jlora.reconstruct(factors, jnp.ones((6, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"`columns` must lie in"):
        jlora.reconstruct(factors, columns=[9])
