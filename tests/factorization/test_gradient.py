"""Derivatives of decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.matrices import make_float32, needs_x64

KEY = jax.random.key(0)

SPECTRA_OF_DERIVATIVE = {
    "distinct": [5, 4, 3, 2, 1, 0.5, 0.3, 0.1],
    "repeated inside": [3, 3, 3, 1, 1, 0.5, 0.2, 0.1],
    "repeated below": [5, 4, 3, 1, 1, 1, 1, 1],
    "rank three": [5, 4, 3, 0, 0, 0, 0, 0],
}


@needs_x64
@pytest.mark.parametrize("name", SPECTRA_OF_DERIVATIVE)
@pytest.mark.parametrize("shape", [(11, 8), (8, 11), (8, 8)], ids=str)
def test_low_rank_approximation_has_the_exact_derivative(shape, name):
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    a = jnp.asarray((left * SPECTRA_OF_DERIVATIVE[name]) @ right)
    direction, weights = (jnp.asarray(rng.standard_normal(shape)) for _ in range(2))

    def approximate(a):
        return jlora.low_rank_approximation(a, 3, key=KEY)

    def approximate_exactly(a):
        u, s, vt = np.linalg.svd(np.asarray(a), full_matrices=False)
        return (u[:, :3] * s[:3]) @ vt[:3]

    step = 1e-6
    shifted = [approximate_exactly(a + sign * step * direction) for sign in (1, -1)]
    slope = (shifted[0] - shifted[1]) / (2 * step)
    value, tangent = jax.jvp(approximate, (a,), (direction,))
    np.testing.assert_allclose(value, approximate_exactly(a), atol=1e-12)
    np.testing.assert_allclose(tangent, slope, atol=1e-7)

    gradient = jax.grad(lambda a: jnp.vdot(approximate(a), weights))(a)
    # Self-adjoint: reverse mode is the same operator.
    np.testing.assert_allclose(
        gradient, jax.jvp(approximate, (a,), (weights,))[1], atol=1e-10
    )


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_derivative_in_float32_through_the_iteration(scale):
    a = scale * make_float32("spiked", 300, 260)
    direction = jax.random.normal(KEY, a.shape, jnp.float32)

    def energy(a):
        return 0.5 * jnp.sum((jlora.low_rank_approximation(a, 6, key=KEY) / scale) ** 2)

    # The gradient of ½ Σ σᵢ² is the approximation itself.
    gradient = jax.grad(energy)(a)
    best = jlora.low_rank_approximation(a, 6, key=KEY) / scale**2
    norm = float(jnp.linalg.norm(best * scale))
    np.testing.assert_allclose(gradient * scale, best * scale, atol=1e-4 * norm)

    assert bool(jnp.isfinite(jax.jvp(energy, (a,), (direction,))[1]))


def test_derivative_in_batches_equals_the_loop():
    a = jax.random.normal(KEY, (3, 12, 9), jnp.float32)

    def total(a):
        return jnp.sum(jnp.sin(jlora.low_rank_approximation(a, 3, key=KEY)))

    loop = jnp.stack([jax.grad(total)(matrix) for matrix in a])
    np.testing.assert_allclose(jax.grad(total)(a), loop, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(a), loop, atol=1e-4)


@needs_x64
def test_truncated_svd_gradient_is_exact():
    rng = np.random.default_rng(6)
    a, direction = (jnp.asarray(rng.standard_normal((12, 9))) for _ in range(2))

    def measure(a):
        u, s, vt = jlora.truncated_svd(a, 3)
        return jnp.sum(jnp.cos((u * s[None]) @ vt))

    step = 1e-6
    slope = (measure(a + step * direction) - measure(a - step * direction)) / (2 * step)
    np.testing.assert_allclose(
        jnp.vdot(jax.grad(measure)(a), direction), slope, rtol=1e-6
    )


def test_randomized_svd_refuses_to_be_differentiated():
    a = jax.random.normal(KEY, (60, 50))
    with pytest.raises(TypeError, match="must not be differentiated"):
        jax.grad(lambda a: jlora.randomized_svd(a, 2, key=KEY).s.sum())(a)
    stopped = jax.grad(
        lambda a: jlora.randomized_svd(jax.lax.stop_gradient(a), 2, key=KEY).s.sum()
    )(a)
    assert bool((stopped == 0).all())


def test_no_derivative_is_silently_wrong():
    a = jax.random.normal(KEY, (60, 50))
    for solve in (
        lambda a: jlora.randomized_svd(a, 2, key=KEY).s,
        lambda a: jlora.adaptive_svd(a, tolerance=0.5, max_rank=3, key=KEY).svd.s,
    ):
        with pytest.raises(TypeError, match="must not be differentiated"):
            jax.grad(lambda a, solve=solve: solve(a).sum())(a)
