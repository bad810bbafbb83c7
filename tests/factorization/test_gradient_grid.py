"""The derivative of `low_rank_approximation`, against the exact formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.matrices import X64

KEY = jax.random.key(0)
DTYPES = [np.float32, np.float64] if X64 else [np.float32]
LEAST_GAP = 500  # below it the derivative is NaN, in eps of the largest singular value
CONSTANT = 50  # relative error, in eps times the largest singular value over the gap


def make_matrix(spectrum, shape, rank, gap, seed=0):
    """Return a matrix in float64 whose values at `rank` have the relative gap."""
    rng = np.random.default_rng(seed)
    size = min(shape)
    s = {
        "power": np.arange(1, size + 1) ** -0.5,
        "exponential": 0.93 ** np.arange(size),
        "linear": np.linspace(1, 0.5, size),
        "flat below": np.r_[np.linspace(2, 1.5, rank), np.ones(size - rank)],
    }[spectrum]
    s[rank:] *= s[rank - 1] / (1 + gap) / s[rank]
    left, right = (np.linalg.qr(rng.standard_normal((n, size)))[0] for n in shape)
    return left * s @ right.T


def differentiate_exactly(a, direction, rank):
    """Return D aₖ[direction] by the float64 SVD."""
    u, s, vt = np.linalg.svd(a)
    m, n = a.shape
    s = np.r_[s, np.zeros(max(m, n) - len(s))]
    inner = u.T @ direction @ vt.T
    result = np.zeros_like(a)
    # In the singular vectors: kept × kept and kept × discarded entries.
    result[:rank, :rank] = inner[:rank, :rank]
    si, sj = s[:rank, None], s[None, rank:]
    right, below = inner[:rank, rank:], inner[rank:, :rank]
    width, height = n - rank, m - rank
    padded = max(width, height)
    both = np.zeros((2, rank, padded))
    both[0, :, :width], both[1, :, :height] = right, below.T
    sj = np.broadcast_to(s[None, rank : rank + padded], (rank, padded))
    sj = np.pad(sj, [(0, 0), (0, padded - sj.shape[1])])
    scale = si / (si**2 - sj**2)
    result[:rank, rank:] = (scale * (si * both[0] + sj * both[1]))[:, :width]
    result[rank:, :rank] = (scale * (si * both[1] + sj * both[0]))[:, :height].T
    return u @ result @ vt


@functools.partial(jax.jit, static_argnames="rank")
def differentiate(a, direction, rank):
    """Return the gradient and the tangent for one direction."""

    def approximate(a):
        return jlora.low_rank_approximation(a, rank, key=KEY)

    _, pull_back = jax.vjp(approximate, a)
    return pull_back(direction)[0], jax.jvp(approximate, (a,), (direction,))[1]


def measure_errors(a, rank, dtype):
    """Return the relative errors of vjp and jvp, and the gap over the largest value."""
    a = a.astype(dtype)
    direction = np.random.default_rng(1).standard_normal(a.shape).astype(dtype)
    exact = differentiate_exactly(a.astype(float), direction.astype(float), rank)

    found = differentiate(jnp.asarray(a), jnp.asarray(direction), rank)
    s = np.linalg.svd(a.astype(float), compute_uv=False)
    errors = [
        np.linalg.norm(np.asarray(each, float) - exact) / np.linalg.norm(exact)
        for each in found
    ]
    return errors, (s[rank - 1] - s[rank]) / s[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("gap", [0.3, 0.03, 1e-3])
@pytest.mark.parametrize("spectrum", ["power", "exponential", "linear", "flat below"])
@pytest.mark.parametrize(("shape", "rank"), [((120, 90), 6), ((40, 50), 3)], ids=str)
def test_error_is_bounded_by_the_gap(shape, rank, spectrum, gap, dtype):
    errors, distance = measure_errors(
        make_matrix(spectrum, shape, rank, gap), rank, dtype
    )
    assert max(errors) <= CONSTANT * np.finfo(dtype).eps / distance


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_gaussian_matrices_at_default_passes(seed, dtype):
    # Their vectors are far from converged after the passes that the value takes.
    a = np.random.default_rng(seed).standard_normal((400, 300))
    errors, distance = measure_errors(a, 16, dtype)
    assert max(errors) <= CONSTANT * np.finfo(dtype).eps / distance


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_it_is_nan_without_a_gap_that_the_dtype_resolves(gap, dtype):
    gap = gap * 100 * np.finfo(dtype).eps
    errors, distance = measure_errors(
        make_matrix("flat below", (60, 50), 4, gap), 4, dtype
    )
    assert distance < LEAST_GAP * np.finfo(dtype).eps
    assert np.isnan(errors).all()


def test_rank_deficient_and_zero_matrices_have_no_derivative():
    for a in (jnp.zeros((9, 7)), jnp.ones((9, 7))):
        gradient = jax.grad(
            lambda a: jlora.low_rank_approximation(a, 2, key=KEY).sum()
        )(a)
        assert bool(jnp.isnan(gradient).all())


def test_at_full_rank_it_is_the_identity():
    a = jax.random.normal(KEY, (5, 4))
    weights = jax.random.normal(jax.random.key(1), (5, 4))
    _, pull_back = jax.vjp(lambda a: jlora.low_rank_approximation(a, 4, key=KEY), a)
    assert bool((pull_back(weights)[0] == weights).all())


@pytest.mark.parametrize("exponent", [-62, -53, -50, -40, 0, 40, 66, 100])
@pytest.mark.parametrize("jitted", [False, True])
def test_the_gradient_is_linear_in_cotangents_of_every_scale(exponent, jitted):
    a = jnp.asarray(make_matrix("power", (20, 20), 3, 0.1), jnp.float32)
    weights = np.random.default_rng(2).standard_normal((20, 20)).astype(np.float32)

    def approximate(a):
        return jlora.low_rank_approximation(a, 3, key=KEY)

    def pull_back(weights):
        return jax.vjp(approximate, a)[1](weights)[0]

    pull_back = jax.jit(pull_back) if jitted else pull_back
    found = np.ldexp(pull_back(np.ldexp(weights, exponent)), -exponent)
    expected = pull_back(weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_higher_order_is_refused():
    a = jax.random.normal(KEY, (6, 5))

    def energy(a):
        return jnp.sum(jlora.low_rank_approximation(a, 2, key=KEY) ** 3)

    with pytest.raises(TypeError, match="differentiated at most once"):
        jax.hessian(energy)(a)
    with pytest.raises(TypeError, match="differentiated at most once"):
        jax.grad(lambda a: jnp.sum(jax.grad(energy)(a)))(a)
