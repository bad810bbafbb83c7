"""Steps on factors: preconditioned, projected, retracted, integrated, transported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import orthonormality
from tests.test_svd_updates import dense, make_svd, normal, product, to_float64

DTYPES = [jnp.float32, *([jnp.float64] if jax.config.jax_enable_x64 else [])]
parametrize_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda dtype: dtype.__name__
)


def make_factors(m=12, n=9, r=3, dtype=jnp.float32, batch=()):
    return jlora.Factors(
        normal(0, *batch, m, r, dtype=dtype), normal(1, *batch, r, n, dtype=dtype)
    )


def to_dense(tangent, svd):
    core, left, right = map(to_float64, tangent)
    u, _, vt = map(to_float64, svd)
    return u @ core @ vt + left @ vt + u @ right


@parametrize_dtypes
def test_scaled_step_does_not_depend_on_the_split(dtype):
    u, v = make_factors(dtype=dtype, batch=(2,))
    change = normal(2, 2, 12, 9, dtype=dtype)  # the gradient to the product
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

    one, other = step(jlora.Factors(u, v)), step(mixed)
    # Rounding, times the conditions of both Gram matrices.
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())
    # In that metric the step is the projection of the gradient on both factors' spaces.
    left = to_float64(u) @ np.linalg.pinv(to_float64(u))
    right = np.linalg.pinv(to_float64(v)) @ to_float64(v)
    expected = to_float64(change) @ right + left @ to_float64(change)
    np.testing.assert_allclose(one, expected, atol=1e-4 * np.abs(one).max())


def test_scaled_step_is_finite_at_the_start_of_lora():
    u, v = make_factors()
    zero = jlora.Factors(u, 0 * v)
    gradient = jlora.Factors(0 * u, v)
    step = jlora.training.precondition_gradient(zero, gradient)
    np.testing.assert_array_equal(step.u, 0 * u)  # nothing to precondition with
    expected = np.linalg.solve(product(u.T, u), to_float64(v))
    np.testing.assert_allclose(step.v, expected, rtol=1e-4, atol=1e-5)
    deficient = jlora.Factors(u.at[:, 1].set(u[:, 0]), v)
    damped = jlora.training.precondition_gradient(
        deficient, jlora.Factors(u, v), delta=1e-3
    )
    assert all(bool(jnp.isfinite(part).all()) for part in damped)
    traced = jax.jit(jlora.training.precondition_gradient)(zero, gradient)
    np.testing.assert_allclose(traced.v, step.v, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_gradient_leaves_the_protected_alone(side):
    gradient = normal(0, 2, 12, 9)
    size = 12 if side == "left" else 9
    basis = jnp.asarray(
        np.linalg.qr(np.random.default_rng(0).standard_normal((2, size, 3)))[0],
        jnp.float32,
    )
    kept = jlora.training.project_gradient_out(gradient, basis, side=side)
    seen = product(basis.mT, kept) if side == "left" else product(kept, basis)
    np.testing.assert_allclose(seen, 0, atol=1e-5)
    np.testing.assert_allclose(
        jlora.training.project_gradient_out(kept, basis, side=side), kept, atol=1e-5
    )
    half = jlora.training.project_gradient_out(
        gradient.astype(jnp.bfloat16), basis, side=side
    )
    assert half.dtype == jnp.bfloat16


def test_moments_follow_the_subspace():
    rng = np.random.default_rng(0)
    old, new = (np.linalg.qr(rng.standard_normal((30, 4)))[0] for _ in range(2))
    # Gradients inside the old space, of independent coordinates: what Adam has averaged.
    mean, spread = rng.standard_normal((4, 5)), rng.uniform(0.5, 2, (4, 5))
    gradients = mean + spread * rng.standard_normal((200_000, 4, 5))
    first, second = jlora.training.transport_moments(
        *(jnp.asarray(part.mean(0), jnp.float32) for part in (gradients, gradients**2)),
        jnp.asarray(old, jnp.float32),
        jnp.asarray(new, jnp.float32),
    )
    carried = np.einsum("pq,kqn->kpn", new.T @ old, gradients)
    np.testing.assert_allclose(first, carried.mean(0), atol=1e-4)
    # Sample correlations of 200,000 draws are of size 0.002; the squares are of size one.
    np.testing.assert_allclose(second, (carried**2).mean(0), atol=0.03)
    same = jlora.training.transport_moments(first, second, jnp.eye(4), jnp.eye(4))
    np.testing.assert_allclose(same[0], first, rtol=1e-6)
    np.testing.assert_allclose(same[1], second, rtol=1e-5)


@parametrize_dtypes
def test_tangent_is_the_orthogonal_projection(dtype):
    svd, gradient = make_svd(12, 9, 3, dtype, (2,)), normal(1, 2, 12, 9, dtype=dtype)
    tangent = jlora.training.project_tangent(svd, gradient)
    inside = to_dense(tangent, svd)
    again = to_dense(
        jlora.training.project_tangent(svd, jnp.asarray(inside, dtype)), svd
    )
    np.testing.assert_allclose(again, inside, atol=1e-5)
    rest = to_float64(gradient) - inside
    u, _, vt = map(to_float64, svd)
    # What is left is orthogonal to every direction x vt and u y.
    np.testing.assert_allclose(rest @ vt.mT, 0, atol=1e-5)
    np.testing.assert_allclose(u.mT @ rest, 0, atol=1e-5)
    factors = make_factors(dtype=dtype, batch=(2,))
    expected = to_dense(
        jlora.training.project_tangent(svd, jnp.asarray(product(*factors), dtype)), svd
    )
    np.testing.assert_allclose(
        to_dense(jlora.training.project_tangent(svd, factors), svd), expected, atol=1e-4
    )


def test_retraction_is_of_second_order_and_the_nearest():
    svd = make_svd(30, 20, 3)
    tangent = jlora.training.project_tangent(svd, normal(1, 30, 20))
    straight = to_dense(tangent, svd)
    errors = []
    for step in (0.4, 0.2, 0.1):
        there = jlora.training.retract(svd, tangent, step)
        assert there.s.shape == (3,)
        assert orthonormality(there.u) < 1e-5
        target = dense(svd) + step * straight
        u, s, vt = np.linalg.svd(target)
        np.testing.assert_allclose(dense(there), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-4)
        errors.append(np.linalg.norm(dense(there) - target))
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    # The next term is of third order: within a quarter of two at these steps.
    np.testing.assert_allclose(slopes, 2, atol=0.25)
    np.testing.assert_allclose(
        dense(jlora.training.retract(svd, tangent, 0.0)), dense(svd), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(30, 20, 4), (20, 30, 4), (7, 30, 5)], ids=str)
def test_integrator_is_exact_where_the_rank_stays(shape):
    m, n, r = shape
    start, end = (make_svd(m, n, r, batch=(2,), seed=seed) for seed in range(2))
    change = jnp.asarray(dense(end) - dense(start), jnp.float32)
    svd, rank = jlora.training.integrate_low_rank(start, change)
    size = float(end.s.max())
    np.testing.assert_allclose(dense(svd), dense(end), atol=1e-4 * size)
    assert rank.tolist() == [r, r]
    assert orthonormality(svd.u) < 1e-5


def test_integrator_adapts_its_rank():
    start = make_svd(30, 20, 4)
    grown = jlora.training.integrate_low_rank(
        start,
        jlora.Factors(normal(1, 30, 2), normal(2, 2, 20)),
        max_rank=8,
        tolerance=1e-5,
    )
    assert grown.svd.s.shape == (8,)
    assert int(grown.rank) == 6
    assert not np.any(grown.svd.s[6:])
    # Three of four directions go but for 1e-3 of the norm.
    kept = start._replace(s=start.s * jnp.array([1.0, 1e-4, 1e-4, 1e-4], start.s.dtype))
    back = jnp.asarray(dense(kept) - dense(start), jnp.float32)
    svd, rank = jlora.training.integrate_low_rank(start, back, tolerance=1e-2)
    assert int(rank) == 1
    np.testing.assert_allclose(svd.s[0], kept.s[0], rtol=1e-5)
    traced = jax.jit(
        lambda svd, change, tolerance: jlora.training.integrate_low_rank(
            svd, change, tolerance=tolerance
        )
    )(start, back, 1e-2)
    assert int(traced.rank) == 1


def test_integrator_does_not_care_for_tiny_singular_values():
    start = make_svd(30, 20, 4)
    tiny = start._replace(s=jnp.array([1.0, 1e-6, 0.0, 0.0]))
    change = jnp.asarray(dense(make_svd(30, 20, 2, seed=3)), jnp.float32)
    svd, _ = jlora.training.integrate_low_rank(tiny, change)
    expected = dense(tiny) + to_float64(change)
    # Both spaces together have three directions that count, and four are kept.
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


SVD = make_svd(6, 5, 2)
FACTORS = make_factors(6, 5, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jlora.training.precondition_gradient(
                FACTORS, jlora.Factors(FACTORS.u[:, :1], FACTORS.v[:1])
            ),
            ValueError,
            r"`gradient.u` must have shape \(6, 2\)",
        ),
        (
            lambda: jlora.training.project_gradient_out(
                jnp.ones((6, 5)), jnp.ones((5, 1))
            ),
            ValueError,
            r"`basis` must have shape \(6, 1\)",
        ),
        (
            lambda: jlora.training.project_gradient_out(
                jnp.ones((6, 5)), jnp.ones((6, 1)), side="up"
            ),
            ValueError,
            "`side` must be one of 'left', 'right', got 'up'",
        ),
        (
            lambda: jlora.training.transport_moments(
                jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((6, 2)), jnp.ones((6, 2))
            ),
            ValueError,
            r"`second` must have shape \(2, 3\)",
        ),
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
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()
