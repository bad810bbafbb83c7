"""Randomized and truncated SVDs against exact ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.matrices import SPECTRA, make_spiked
from jlora.factorization.svd import _randomized_svd
from tests.helpers.accuracy import optimal_error, orthonormality, residual
from tests.helpers.gallery import GALLERY
from tests.helpers.matrices import X64

DTYPES = [jnp.float32, jnp.bfloat16, *([jnp.float64] if X64 else [])]

SHAPES = [(160, 120), (120, 160), (128, 128)]

KEY = jax.random.key(0)

NVIDIA_MATRIX = [
    [0.76420743, 0.61411544, 0.81724151, 0.42040879, 0.03446089],
    [0.03697287, 0.85962444, 0.67584086, 0.45594666, 0.02074835],
    [0.42018265, 0.39204509, 0.12657948, 0.90250559, 0.23076218],
    [0.50339844, 0.92974961, 0.21213988, 0.63962457, 0.58124562],
    [0.58325673, 0.11589871, 0.39831112, 0.21492685, 0.00540355],
]

decompositions = pytest.mark.parametrize(
    "decompose",
    [
        lambda a, rank: jlora.randomized_svd(a, rank, key=KEY),
        # Narrow blocks, so that even these small matrices go through the iterations.
        lambda a, rank: jlora.randomized_svd(
            a, rank, key=KEY, block_size=4, num_passes=20
        ),
        lambda a, rank: jlora.randomized_svd(a, rank, key=KEY, method="subspace"),
        lambda a, rank: jlora.truncated_svd(a, rank),
    ],
    ids=["krylov default", "krylov narrow", "subspace", "truncated"],
)


def check_svd(a, svd, rank, dtype, excess=0.02):
    """Assert the properties that every decomposition of every matrix has."""
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert [part.dtype for part in svd] == [compute] * 3
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5

    s = np.asarray(svd.s, np.float64)
    assert np.all(np.diff(s) <= 0)
    assert np.all(s >= 0)

    exact = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
    # Each of the 10 blocks holds up to 4 eps of noise, added to make it
    # independent.
    rounding = 40 * np.finfo(compute).eps * np.linalg.norm(exact)
    assert residual(a, svd) <= (1 + excess) * np.linalg.norm(exact[rank:]) + rounding
    assert np.all(s <= exact[:rank] + rounding)


@decompositions
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_is_orthonormal_sorted_and_near_optimal(decompose, dtype, shape):
    for spectrum, make in SPECTRA.items():
        a = jnp.asarray(make(np.random.default_rng(0), *shape), dtype)
        print(spectrum)  # shown when the next line fails
        check_svd(a, decompose(a, 8), 8, dtype)


@pytest.mark.parametrize("name", GALLERY)
def test_gallery_over_ten_seeds(name):
    for seed in range(10):
        a = GALLERY[name](np.random.default_rng(seed), 150, 120).astype(np.float32)
        key = jax.random.key(seed)
        svd = jlora.randomized_svd(a, 8, key=key, block_size=4, num_passes=20)
        check_svd(a, svd, 8, jnp.float32)

        wide = jlora.randomized_svd(a.T, 8, key=key, method="subspace")
        # Ten passes of subspace iteration stay within 2 %, also on flat spectra.
        check_svd(a.T, wide, 8, jnp.float32, excess=0.02)


@pytest.mark.parametrize("name", ["spiked", "flat", "exponential", "root"])
def test_one_sketch_keeps_the_published_expectation(name):
    """E‖a − qqᵀa‖_F ≤ √(1 + k / (p − 1)) τ: Halko et al. 2011, theorem 10.5."""
    a = GALLERY[name](np.random.default_rng(0), 150, 120).astype(np.float32)

    rank, oversampling = 8, 6

    errors = []
    for seed in range(20):
        svd = jlora.randomized_svd(
            a,
            rank + oversampling,
            key=jax.random.key(seed),
            num_passes=2,
            method="subspace",
            block_size=rank + oversampling,
        )
        errors.append(residual(a, svd))

    assert np.mean(errors) <= (1 + rank / (oversampling - 1)) ** 0.5 * optimal_error(
        a, rank
    )


def test_singular_values_of_a_small_known_matrix():
    a = jnp.array([[1.0, 2.0], [4.0, 5.0], [2.0, 1.0]])
    svd = jlora.randomized_svd(a, 2, key=KEY)
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    np.testing.assert_allclose(s[0], 7.065283, rtol=1e-6)
    np.testing.assert_allclose(svd.s, s, rtol=1e-5)
    np.testing.assert_allclose(abs(svd.u), abs(u), atol=1e-5)
    np.testing.assert_allclose(abs(svd.vt), abs(vt), atol=1e-5)
    np.testing.assert_allclose(
        abs(svd.u[:, 0]), [0.308219, 0.906133, 0.289695], atol=1e-5
    )


def test_singular_values_of_the_matrix_in_nvidias_examples():
    a = jnp.array(NVIDIA_MATRIX, jnp.float32)
    known = [2.36539241, 0.81117785, 0.68562255, 0.41390509, 0.01519322]
    np.testing.assert_allclose(jlora.truncated_svd(a, 5).s, known, atol=1e-6)
    for rank in range(1, 6):
        svd = jlora.randomized_svd(a, rank, key=KEY)
        np.testing.assert_allclose(svd.s, known[:rank], atol=1e-6)


def test_one_trace_a_shape():
    def count_programs():
        return _randomized_svd._cache_size()

    initial = count_programs()
    for seed in range(3):
        a = jax.random.normal(jax.random.key(seed), (190, 170))
        jlora.randomized_svd(a, 3, key=jax.random.key(seed))
    assert count_programs() == initial + 1

    jlora.randomized_svd(a.T, 3, key=KEY)
    assert count_programs() == initial + 2


@pytest.mark.parametrize("spectrum", ["spiked", "flat"])
def test_krylov_default_excess_error_over_ten_seeds(spectrum):
    a = jnp.asarray(SPECTRA[spectrum](np.random.default_rng(1), 512, 384), jnp.float32)
    best = optimal_error(a, 16)
    for seed in range(10):
        svd = jlora.randomized_svd(a, 16, key=jax.random.key(seed))
        assert residual(a, svd) / best - 1 < 1e-4


@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize(
    "shape", [(40, 60), (60, 40), (1, 40), (40, 1), (1, 1)], ids=str
)
def test_every_rank_up_to_the_full_one(shape, rank):
    rank = min(rank, *shape)
    a = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    for svd in (jlora.randomized_svd(a, rank, key=KEY), jlora.truncated_svd(a, rank)):
        rounding = 20 * np.finfo(np.float32).eps * float(jnp.linalg.norm(a))
        assert residual(a, svd) <= 1.02 * optimal_error(a, rank) + rounding


@decompositions
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_or_inf_gives_nan_for_that_matrix_only(decompose, bad):
    a = jax.random.normal(KEY, (2, 50, 60)).at[0, 3, 4].set(bad)
    svd = decompose(a, 3)
    assert all(bool(jnp.isnan(part[0]).all()) for part in svd)
    assert all(bool(jnp.isfinite(part[1]).all()) for part in svd)


@decompositions
def test_batch_jit_and_vmap_equal_the_loop(decompose):
    a = jax.random.normal(KEY, (3, 50, 60), jnp.float32)
    loop = [decompose(matrix, 3) for matrix in a]
    ways = [decompose(a, 3), jax.jit(lambda a: decompose(a, 3))(a)]
    ways.append(jax.vmap(lambda a: decompose(a, 3))(a))

    for way in ways:
        for i, one in enumerate(loop):
            product = jnp.matmul(one.u * one.s[None], one.vt, precision="highest")
            batch = jnp.matmul(
                way.u[i] * way.s[i][None], way.vt[i], precision="highest"
            )
            # Rounding differs between batched and single LAPACK and matrix products.
            np.testing.assert_allclose(batch, product, atol=2e-4)


def test_same_key_same_bits_and_other_key_same_subspace():
    a = jnp.asarray(make_spiked(np.random.default_rng(3), 256, 256), jnp.float32)
    one, again, other = (
        jlora.randomized_svd(a, 12, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    assert all(bool((x == y).all()) for x, y in zip(one, again, strict=True))
    cosines = np.linalg.svd(np.asarray(one.u.T @ other.u), compute_uv=False)
    assert cosines.min() > 1 - 1e-4


def test_odd_number_of_passes():
    a = jnp.asarray(make_spiked(np.random.default_rng(4), 256, 200), jnp.float32)
    errors = [
        residual(a, jlora.randomized_svd(a, 12, key=KEY, num_passes=p, block_size=12))
        for p in (4, 5, 6)
    ]
    assert errors[0] > errors[1] > errors[2]


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
