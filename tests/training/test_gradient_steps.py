"""Gradients of factors: preconditioned, projected, and moments carried over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.dtypes import parametrize_full_dtypes
from tests.helpers.factors import make_factors, normal, product, to_float64

FACTORS = make_factors(6, 5, 2)


@parametrize_full_dtypes
def test_scaled_step_does_not_depend_on_the_split(dtype):
    u, v = make_factors(12, 9, 3, dtype, batch=(2,))
    change = normal(2, 2, 12, 9, dtype=dtype)  # the gradient of the product
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, 3))
    mixed = jlora.Factors(
        jnp.asarray(to_float64(u) @ mix, dtype),
        jnp.asarray(np.linalg.inv(mix) @ to_float64(v), dtype),
    )

    def step(factors):
        gradient = jlora.Factors(change @ factors.v.mT, factors.u.mT @ change)
        du, dv = jlora.training.precondition_gradient(factors, gradient, delta=0.0)
        # The first-order change of the product.
        return product(du, factors.v) + product(factors.u, dv)

    # The tolerance is rounding times the condition numbers of both Gram matrices.
    one, other = step(jlora.Factors(u, v)), step(mixed)
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())

    # In this metric the step projects the gradient onto the spaces of both factors.
    left = to_float64(u) @ np.linalg.pinv(to_float64(u))
    right = np.linalg.pinv(to_float64(v)) @ to_float64(v)
    expected = to_float64(change) @ right + left @ to_float64(change)
    np.testing.assert_allclose(one, expected, atol=1e-4 * np.abs(one).max())


def test_scaled_step_is_finite_at_the_initial_factors_of_lora():
    u, v = make_factors(12, 9, 3)
    zero = jlora.Factors(u, 0 * v)
    gradient = jlora.Factors(0 * u, v)
    step = jlora.training.precondition_gradient(zero, gradient)

    # With v = 0 the gradient of u has no preconditioner, so u does not move.
    np.testing.assert_array_equal(step.u, 0 * u)
    expected = np.linalg.solve(product(u.T, u), to_float64(v))
    np.testing.assert_allclose(step.v, expected, rtol=1e-4, atol=1e-5)

    # Two equal columns make the Gram matrix of u singular.
    deficient = jlora.Factors(u.at[:, 1].set(u[:, 0]), v)
    damped = jlora.training.precondition_gradient(
        deficient, jlora.Factors(u, v), delta=1e-3
    )
    assert all(bool(jnp.isfinite(part).all()) for part in damped)

    traced = jax.jit(jlora.training.precondition_gradient)(zero, gradient)
    np.testing.assert_allclose(traced.v, step.v, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_gradient_is_orthogonal_to_the_protected_directions(side):
    def project(gradient):
        return jlora.training.project_gradient_out(gradient, basis, side=side)

    gradient = normal(0, 2, 12, 9)
    size = 12 if side == "left" else 9
    columns = np.random.default_rng(0).standard_normal((2, size, 3))
    basis = jnp.asarray(np.linalg.qr(columns)[0], jnp.float32)

    projected = project(gradient)
    seen = product(basis.mT, projected) if side == "left" else product(projected, basis)
    np.testing.assert_allclose(seen, 0, atol=1e-5)
    np.testing.assert_allclose(project(projected), projected, atol=1e-5)
    assert project(gradient.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_moments_follow_the_subspace():
    rng = np.random.default_rng(0)
    old, new = (np.linalg.qr(rng.standard_normal((30, 4)))[0] for _ in range(2))

    # Gradients inside the old space with independent coordinates. Adam has averaged
    # them.
    mean, spread = rng.standard_normal((4, 5)), rng.uniform(0.5, 2, (4, 5))
    gradients = mean + spread * rng.standard_normal((200_000, 4, 5))
    first, second = jlora.training.transport_moments(
        *(jnp.asarray(part.mean(0), jnp.float32) for part in (gradients, gradients**2)),
        jnp.asarray(old, jnp.float32),
        jnp.asarray(new, jnp.float32),
    )

    carried = np.einsum("pq,kqn->kpn", new.T @ old, gradients)
    np.testing.assert_allclose(first, carried.mean(0), atol=1e-4)
    # Sample correlations of 200,000 draws are of size 0.002. The squares are of size
    # one.
    np.testing.assert_allclose(second, (carried**2).mean(0), atol=0.03)

    same = jlora.training.transport_moments(first, second, jnp.eye(4), jnp.eye(4))
    np.testing.assert_allclose(same[0], first, rtol=1e-6)
    np.testing.assert_allclose(same[1], second, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: jlora.training.precondition_gradient(
                FACTORS, jlora.Factors(FACTORS.u[:, :1], FACTORS.v[:1])
            ),
            r"`gradient.u` must have shape \(6, 2\)",
        ),
        (
            lambda: jlora.training.project_gradient_out(
                jnp.ones((6, 5)), jnp.ones((5, 1))
            ),
            r"`basis` must have shape \(6, 1\)",
        ),
        (
            lambda: jlora.training.project_gradient_out(
                jnp.ones((6, 5)), jnp.ones((6, 1)), side="up"
            ),
            "`side` must be one of 'left', 'right', got 'up'",
        ),
        (
            lambda: jlora.training.transport_moments(
                jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((6, 2)), jnp.ones((6, 2))
            ),
            r"`second` must have shape \(2, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
