"""What surrounds the decompositions: warm starts, adaptive rank, estimates, the derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.matrices import SPECTRA, make_matrix
from jlora.factorization.core import decompose_by_lapack, decompose_by_polar
from jlora.factorization.operators import multiply, multiply_transposed
from jlora.factorization.orthonormal import orthonormalize_against
from tests.helpers.accuracy import optimal_error, orthonormality, residual

X64 = jax.config.jax_enable_x64
KEY = jax.random.key(0)
needs_x64 = pytest.mark.skipif(
    not X64, reason="differences of 1e-6 need JAX_ENABLE_X64=1"
)


def make_float32(spectrum, m, n, layer=0):
    return jnp.asarray(make_matrix(spectrum, m, n, layer), jnp.float32)


# Warm starts


@pytest.mark.parametrize("spectrum", ["spiked", "flat", "low rank plus noise"])
def test_warm_start_beats_cold_at_equal_passes(spectrum):
    a = make_float32(spectrum, 240, 200)
    drifted = a + 0.02 * jnp.linalg.norm(a) / 220 * jax.random.normal(
        KEY, a.shape, a.dtype
    )
    start = jlora.truncated_svd(a, 12)
    best = optimal_error(drifted, 12)
    for passes in (2, 3, 4):
        settings = {"key": KEY, "num_passes": passes, "block_size": 20}
        warm = residual(
            drifted, jlora.randomized_svd(drifted, 12, warm_start=start, **settings)
        )
        cold = residual(drifted, jlora.randomized_svd(drifted, 12, **settings))
        assert warm / best - 1 < 0.5 * (cold / best - 1)


def test_one_pair_of_passes_a_step_follows_a_drifting_matrix():
    a = make_float32("spiked", 240, 200)
    svd = jlora.randomized_svd(a, 12, key=KEY)
    for step in range(8):
        key = jax.random.fold_in(KEY, step)
        a = a + 0.02 * jnp.linalg.norm(a) / 220 * jax.random.normal(
            key, a.shape, a.dtype
        )
        svd = jlora.randomized_svd(a, 12, key=key, warm_start=svd)
    # Ten passes of subspace iteration leave 3e-3 on this spectrum.
    assert residual(a, svd) / optimal_error(a, 12) - 1 < 3e-3
    assert orthonormality(svd.u) < 1e-5


def test_start_in_batches_and_of_other_ranks():
    a = jnp.stack([make_float32("spiked", 80, 60, layer) for layer in range(2)])
    for rank in (2, 10):
        start = jlora.truncated_svd(a, rank)
        svd = jlora.randomized_svd(a, 4, key=KEY, warm_start=start)
        assert svd.u.shape == (2, 80, 4)
    with pytest.raises(
        ValueError, match=r"`warm_start.u` must have shape \(2, 80, 3\)"
    ):
        jlora.randomized_svd(a, 4, key=KEY, warm_start=jlora.truncated_svd(a.mT, 3))
    with pytest.raises(TypeError, match="`warm_start` must be a triple"):
        jlora.randomized_svd(a, 4, key=KEY, warm_start=a)


# The pieces


@pytest.mark.parametrize("spectrum", [*SPECTRA])
@pytest.mark.parametrize(
    "num_rows", [48, 160]
)  # LAPACK: decomposed whole, and reduced first
@pytest.mark.parametrize("decompose", ["lapack", "polar"])
def test_core_is_exact_on_every_backend(decompose, num_rows, spectrum):
    core, rank = make_float32(spectrum, num_rows, num_rows + 8), 20
    noise = jax.random.normal(KEY, (rank, num_rows + 8), jnp.float32)
    if decompose == "lapack":
        e, s, f = decompose_by_lapack(core, rank)
    else:
        e, s, f = jax.jit(decompose_by_polar, static_argnums=1)(core, rank, noise)
    assert orthonormality(e) < 1e-5
    assert orthonormality(f.mT) < 1e-5
    norm = float(np.linalg.norm(np.asarray(core, np.float64)))
    # LAPACK's own backward error grows with the size: 34 eps for 160 rows of ones.
    rounding = 20 * num_rows / 48 * np.finfo(np.float32).eps * norm
    assert residual(core, (e, s, f)) <= optimal_error(core, rank) + rounding
    exact = np.linalg.svd(np.asarray(core, np.float64), compute_uv=False)[:rank]
    np.testing.assert_allclose(s, exact, atol=rounding)
    assert np.all(np.diff(np.asarray(s)) <= 0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "kind", ["independent", "inside the basis", "parallel", "zero", "mixed"]
)
def test_orthonormalize_against_is_orthogonal_to_both(kind, seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((300, 24)))[0].T
    y = {
        "independent": rng.standard_normal((6, 300)),
        "inside the basis": rng.standard_normal((6, 24)) @ basis,
        "parallel": rng.standard_normal((6, 1)) * rng.standard_normal(300),
        "zero": np.zeros((6, 300)),
        "mixed": np.vstack(
            [
                rng.standard_normal((1, 24)) @ basis,
                np.ones((4, 300)),
                rng.standard_normal((1, 300)),
            ]
        ),
    }[kind]
    basis, y, noise = (
        jnp.asarray(x, jnp.float32) for x in (basis, y, rng.standard_normal((6, 300)))
    )
    # Nothing is near: the whole part inside the basis is left to the projections.
    rows, near_part, part = orthonormalize_against(basis, jnp.zeros_like(y), y, noise)
    assert not np.any(near_part)
    assert orthonormality(jnp.concatenate([basis, rows]).mT) < 1e-5
    together = np.concatenate([basis, rows]).astype(np.float64)
    left = np.asarray(y, np.float64) @ (np.eye(300) - together.T @ together)
    assert np.linalg.norm(left) <= 1e-5 * np.linalg.norm(y)
    np.testing.assert_allclose(part, y @ basis.mT, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_split_products_are_as_exact_as_float32(dtype):
    a = jax.random.normal(KEY, (2, 130, 90), jnp.float32).astype(dtype)
    rows = jlora.truncated_svd(jax.random.normal(KEY, (2, 130, 90), jnp.float32), 7)
    wide = np.asarray(a, np.float64)
    for found, thin, expected in (
        (
            multiply(a, rows.vt),
            rows.vt,
            lambda thin: np.asarray(thin, np.float64) @ wide.mT,
        ),
        (
            multiply_transposed(a, rows.u.mT),
            rows.u.mT,
            lambda thin: np.asarray(thin, np.float64) @ wide,
        ),
    ):
        exact = expected(thin)
        assert found.dtype == jnp.float32
        # Three parts hold 24 bits; the sum over 130 terms rounds like any float32 product.
        assert np.linalg.norm(np.asarray(found) - exact) < 1e-6 * np.linalg.norm(exact)


# Memory and sharding


@pytest.mark.parametrize("rank", [8, 32])
def test_no_copy_of_the_matrix(rank):
    m, n, passes = 1536, 1280, 16
    a = jax.ShapeDtypeStruct((m, n), jnp.float32)
    solve = functools.partial(
        jlora.randomized_svd, rank=rank, key=KEY, num_passes=passes
    )
    memory = jax.jit(lambda a: solve(a)).lower(a).compile().memory_analysis()
    width = max(8, rank // 2) * passes // 2
    assert memory.temp_size_in_bytes <= 3 * (m + n) * width * 4
    assert memory.temp_size_in_bytes < m * n * 4


# Adaptive rank


@pytest.mark.parametrize(
    ("spectrum", "tolerance"),
    [
        ("exponential", 0.5),
        ("exponential", 0.01),
        ("exponential", 1e-4),
        ("spiked", 0.9),
        ("low rank plus noise", 0.1),
        ("rank 5", 0.1),
        ("rank 5", 1e-4),
        ("zero", 0.1),
        ("huge", 0.9),
        ("tiny", 0.9),
    ],
)
@pytest.mark.parametrize("shape", [(500, 420), (420, 500), (60, 50)], ids=str)
def test_adaptive_svd_meets_its_tolerance_with_few_triplets(spectrum, tolerance, shape):
    a = make_float32(spectrum, *shape)
    result = jlora.adaptive_svd(a, tolerance=tolerance, max_rank=45, key=KEY)
    svd, rank = result
    norm = np.linalg.norm(np.asarray(a, np.float64))
    assert svd.u.shape == (shape[0], 45)
    assert bool(result.is_reached)
    assert residual(a, svd) <= tolerance * norm
    assert bool((svd.s[int(rank) :] == 0).all())
    s = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    least = next(
        k for k in range(len(s) + 1) if np.linalg.norm(s[k:]) <= tolerance * norm
    )
    assert least <= int(rank) <= least + 2


def test_adaptive_svd_says_when_it_cannot():
    flat = make_float32("flat", 300, 260)
    svd, rank = result = jlora.adaptive_svd(flat, tolerance=0.1, max_rank=9, key=KEY)
    assert (int(rank), svd.s.shape, bool(result.is_reached)) == (9, (9,), False)
    true = residual(flat, svd) / np.linalg.norm(np.asarray(flat, np.float64))
    assert float(result.error) == pytest.approx(true, rel=0.05)
    if not X64:
        # Below what float32 resolves, even where the matrix has so low a rank.
        thin = make_float32("rank 5", 300, 260)
        assert not bool(
            jlora.adaptive_svd(thin, tolerance=1e-7, max_rank=9, key=KEY).is_reached
        )


def test_adaptive_svd_of_a_batch_and_of_nan():
    a = jnp.stack(
        [make_float32(name, 300, 260) for name in ("exponential", "rank 5", "spiked")]
    )
    a = a.at[2, 0, 0].set(jnp.nan)
    result = jax.jit(
        lambda a: jlora.adaptive_svd(a, tolerance=0.1, max_rank=30, key=KEY)
    )(a)
    assert result.rank.tolist()[:2] == [11, 5] or result.rank.tolist()[:2] == [10, 5]
    assert result.is_reached.tolist() == [True, True, False]
    assert bool(jnp.isnan(result.svd.u[2]).all())
    assert bool(jnp.isfinite(result.svd.u[:2]).all())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tolerance": 0.0}, ValueError, r"`tolerance` must lie in \(0, 1\), got 0.0"),
        ({"tolerance": "x"}, TypeError, "`tolerance` must be a Python number"),
        ({"max_rank": 21}, ValueError, r"`max_rank` must be at most min\(m, n\) = 20"),
    ],
)
def test_adaptive_svd_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        jlora.adaptive_svd(
            jnp.ones((30, 20)),
            **{"tolerance": 0.1, "max_rank": 5, "key": KEY, **arguments},
        )


# Error estimates


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probe_estimate_is_unbiased(dtype):
    a = make_float32("spiked", 200, 160).astype(dtype)
    svd = jlora.truncated_svd(a, 10)
    true = residual(a, svd)
    squares = [
        float(jlora.estimate_error(a, svd, key=jax.random.key(seed))) ** 2 / true**2
        for seed in range(60)
    ]
    spread = np.std(squares, ddof=1)
    # Four standard errors of the mean; the spread of one estimate is stated as a few per cent.
    assert abs(np.mean(squares) - 1) < 4 * spread / 60**0.5
    assert spread < 0.15


@pytest.mark.parametrize("spectrum", ["spiked", "flat", "exponential"])
def test_leave_one_out_estimate_is_calibrated(spectrum):
    a = make_float32(spectrum, 300, 260)
    ratios = []
    for seed in range(20):
        omega = jax.random.normal(jax.random.key(seed), (260, 24), jnp.float32)
        sketch = jnp.matmul(a, omega, precision="highest")
        q = np.linalg.qr(np.asarray(sketch, np.float64))[0]
        wide = np.asarray(a, np.float64)
        true = np.linalg.norm(wide - q @ (q.T @ wide))
        ratios.append(
            float(jlora.factorization.estimate_sketch_error(sketch, key=KEY)) / true
        )
    # One column less: ten per cent of a decade on the exponential one, next to nothing else.
    allowed = (0.7, 2.0) if spectrum == "exponential" else (0.97, 1.05)
    assert allowed[0] < np.mean(ratios) < allowed[1]


def test_estimates_refuse():
    a = jnp.ones((30, 20))
    with pytest.raises(ValueError, match="`svd` must have shape"):
        jlora.estimate_error(a, jlora.truncated_svd(a.T, 2), key=KEY)
    with pytest.raises(ValueError, match="`sketch` must have at most as many columns"):
        jlora.factorization.estimate_sketch_error(jnp.ones((3, 4)), key=KEY)


# The derivative


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
    ends = [approximate_exactly(a + sign * step * direction) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
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


def test_no_derivative_is_silently_wrong():
    a = jax.random.normal(KEY, (60, 50))
    for solve in (
        lambda a: jlora.randomized_svd(a, 2, key=KEY).s,
        lambda a: jlora.adaptive_svd(a, tolerance=0.5, max_rank=3, key=KEY).svd.s,
    ):
        with pytest.raises(TypeError, match="must not be differentiated"):
            jax.grad(lambda a, solve=solve: solve(a).sum())(a)
