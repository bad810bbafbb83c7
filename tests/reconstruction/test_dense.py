"""Merges against dense float64: values, derivatives, memory, and unmerging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.ahead_of_time import compile_elsewhere, why_not
from tests.helpers.factors import DTYPES, make_factors, multiply_out, to_float64
from tests.helpers.merges import make_base, make_case, parametrize_low

KEY = jax.random.key(0)

SHAPES = [(1, 1), (7, 5), (129, 257), (300, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_reconstruct_against_float64(dtype, rank, shape, batch):
    factors, base = (
        make_factors(*shape, rank, dtype, batch),
        make_base(shape, dtype, batch),
    )

    expected = np.asarray(base, np.float64) + 0.5 * multiply_out(factors)
    found = jlora.reconstruct(factors, base, scale=0.5)
    assert found.dtype == dtype
    # One rounding to the storage dtype, and the compute dtype's over `rank` terms.
    tolerance = float(jnp.finfo(dtype).eps) * np.abs(expected).max() + 1e-5
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance)

    delta = np.asarray(jlora.reconstruct(factors, dtype=jnp.float32), np.float64)
    np.testing.assert_allclose(delta, multiply_out(factors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [2, [0, 3], slice(1, 2)], ids=str)
def test_reconstruct_columns_recomputes_only_these(columns):
    factors, base = make_factors(6, 5, 3), make_base((6, 5), jnp.float32)
    full = jlora.reconstruct(factors, base, scale=2.0)
    part = jlora.reconstruct(factors, base, scale=2.0, columns=columns)
    chosen = np.arange(5)[-2:] if isinstance(columns, int) else np.arange(5)[columns]
    kept = np.setdiff1d(np.arange(5), chosen)
    np.testing.assert_allclose(part[:, chosen], full[:, chosen], rtol=1e-6)
    assert bool((part[:, kept] == base[:, kept]).all())
    delta = jlora.reconstruct(factors, scale=2.0, columns=columns)
    np.testing.assert_allclose(delta, 2 * multiply_out(factors)[:, chosen], rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)
@pytest.mark.parametrize("rank", [8, 40])
def test_donated_memory_is_reused(rank, dtype):
    factors, base = make_case((2048, 256), rank, dtype)
    kept = jnp.array(base)
    expected = jlora.reconstruct(factors, kept)
    address = base.unsafe_buffer_pointer()

    merged = jlora.reconstruct(factors, base, donate=True)
    assert base.is_deleted()
    assert merged.unsafe_buffer_pointer() == address
    np.testing.assert_allclose(
        to_float64(merged), to_float64(expected), rtol=1e-2, atol=1e-6
    )

    outer = jax.jit(lambda w, f: jlora.reconstruct(f, w, donate=True), donate_argnums=0)
    memory = outer.lower(kept, factors).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kept.nbytes
    # The factors in float32, and a few blocks of rows: half of the float32 product.
    assert memory.temp_size_in_bytes <= 4 * (2048 + 256) * rank + 4 * 2048 * 256 / 2

    columns = jnp.array(kept)
    jlora.reconstruct(factors, columns, columns=[3, 1], donate=True)
    assert columns.is_deleted()


@pytest.mark.parametrize("target", ["H200", "TPU v5e"])
def test_a_donated_merge_compiled_for_an_accelerator_is_one_kernel(target):
    if reason := why_not(target):
        pytest.skip(reason)
    for program in ("reconstruct bfloat16, rank 16", "reconstruct bfloat16, rank 64"):
        found = compile_elsewhere(target, program)
        assert found["temporary_bytes"] == 0
        assert found["alias_bytes"] == 2 * 4096 * 4096
        assert found["num_kernels"] == 1


def test_unmerge_restores_the_base():
    factors, base = make_case((128, 96), 16, jnp.float32)
    merged = jlora.reconstruct(factors, base, scale=2.0)
    back = jlora.reconstruction.unmerge(factors, merged, scale=2.0)
    np.testing.assert_allclose(
        back, base, rtol=0, atol=2 * 1.2e-7 * float(jnp.abs(merged).max())
    )
    some = jlora.reconstruct(factors, base, columns=[1, 5])
    again = jlora.reconstruction.unmerge(factors, some, columns=[1, 5])
    assert bool((again[:, 2:5] == base[:, 2:5]).all())
    np.testing.assert_allclose(again, base, atol=1e-6)


@parametrize_low
@pytest.mark.parametrize("rank", [4, 40])
def test_unmerge_of_a_pair_is_exact_bit_by_bit(rank, dtype):
    factors, base = make_case((512, 256), rank, dtype, delta=1e-3)
    merged = jlora.reconstruct(factors, base, rounding="compensated")
    back = jlora.reconstruction.unmerge(factors, merged)
    assert back.dtype == dtype

    ratio = 64 if dtype == jnp.bfloat16 else 1024
    is_held = np.abs(multiply_out(factors)) < ratio * np.abs(to_float64(base))
    assert is_held.mean() > 0.99
    same = np.asarray(back).view(np.uint16) == np.asarray(base).view(np.uint16)
    assert same[is_held].all()

    error = np.abs(to_float64(back) - to_float64(base))
    assert np.all(error <= 2.0**-16 * np.abs(multiply_out(factors)) + 2.0**-24)

    columns = jlora.reconstruct(factors, base, columns=3, rounding="compensated")
    assert not np.any(to_float64(columns.low)[:, :-3])
    np.testing.assert_array_equal(
        to_float64(jlora.reconstruction.unmerge(factors, columns, columns=3))[:, :-3],
        to_float64(base)[:, :-3],
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_derivatives_equal_derivatives_of_the_sum(rounding):
    factors, base = make_case((6, 5), 3, jnp.bfloat16, rms=1.0, delta=1.0)
    key = KEY if rounding == "stochastic" else None
    weights = jax.random.normal(KEY, (6, 5), jnp.float32)

    def measure(u, v, scale):
        merged = jlora.reconstruct(
            jlora.Factors(u, v), base, scale=scale, rounding=rounding, key=key
        )
        high = merged.high if rounding == "compensated" else merged
        return jnp.sum(high.astype(jnp.float32) * weights)

    gradients = jax.grad(measure, (0, 1, 2))(*factors, jnp.float32(0.5))
    u, v, g = to_float64(factors.u), to_float64(factors.v), to_float64(weights)
    exact = 0.5 * g @ v.T, 0.5 * u.T @ g, np.sum(g * (u @ v))
    for found, expected in zip(gradients, exact, strict=True):
        # The cotangent of a bfloat16 result is one itself.
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def test_second_derivatives_and_forward_mode():
    factors, base = make_case((4, 3), 2, jnp.float32, rms=1.0, delta=1.0)

    def merge(u, v):
        return jlora.reconstruct(jlora.Factors(u, v), base, scale=0.5)

    def plain(u, v):
        return base + 0.5 * (u @ v)

    directions = jax.tree.map(jnp.ones_like, tuple(factors))
    primals = tuple(factors)
    for one, other in zip(
        jax.jvp(merge, primals, directions),
        jax.jvp(plain, primals, directions),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)

    def make_hessian(function):
        return jax.hessian(lambda u, v: jnp.sum(jnp.sin(function(u, v))), (0, 1))(
            *factors
        )

    one, other = make_hessian(merge), make_hessian(plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other
    )
    mapped = jax.vmap(jax.grad(lambda u, v: jnp.sum(merge(u, v) ** 2)), (0, None))(
        jnp.stack([factors.u, 2 * factors.u]), factors.v
    )
    np.testing.assert_allclose(
        mapped[1],
        jax.grad(lambda u: jnp.sum(plain(u, factors.v) ** 2))(2 * factors.u),
        rtol=1e-4,
    )


def test_the_example_of_the_article(tmp_path):
    """Load A, A ≈ U V, domain weights into the last columns of V, reconstruct, save."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((24, 16)).astype(np.float32)
    domain = rng.standard_normal((16, 4)).astype(np.float32)

    jlora.save_arrays(tmp_path / "a.npy", a)
    loaded = jlora.load_arrays(tmp_path / "a.npy")["a"]
    factors = jlora.split_svd(
        jlora.randomized_svd(loaded, 16, key=jax.random.key(0)), "right"
    )
    adapted = jlora.reconstruct(jlora.set_columns(factors, 4, domain))
    jlora.save_arrays(tmp_path / "adapted.npy", adapted)

    saved = jlora.load_arrays(tmp_path / "adapted.npy")["adapted"]
    untouched = np.linalg.norm(saved[:, :12] - a[:, :12]) / np.linalg.norm(a[:, :12])
    assert untouched < 1e-5
    np.testing.assert_allclose(saved[:, 12:], np.asarray(factors.u) @ domain, atol=1e-4)


FACTORS, BASE = make_case((6, 5), 3, jnp.bfloat16)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"rounding": "up"},
            ValueError,
            "`rounding` must be one of 'nearest', 'stochastic'",
        ),
        (
            {"rounding": "stochastic"},
            TypeError,
            "`key` must be given for rounding='stochastic'",
        ),
        ({"rounding": "stochastic", "key": 0}, TypeError, "typed PRNG key"),
        ({"key": KEY}, ValueError, "`key` must be left out with rounding='nearest'"),
        (
            {"rounding": "compensated", "dtype": jnp.float32},
            ValueError,
            "`rounding` must be 'nearest' for a result in float32",
        ),
        (
            {"donate": True, "dtype": jnp.float32},
            ValueError,
            "`donate` must come with a base",
        ),
        (
            {"implementation": "fast"},
            ValueError,
            "`implementation` must be one of 'cast'",
        ),
        (
            {"implementation": "blocked", "dtype": jnp.float32},
            NotImplementedError,
            "got 'blocked', which needs exactly one base, rounding='nearest' and",
        ),
        (
            {"implementation": "cast", "rounding": "compensated"},
            NotImplementedError,
            "got 'cast'",
        ),
        ({"columns": [7]}, ValueError, r"`columns` must lie in \[-5, 5\), got 7"),
    ],
)
def test_refusals(settings, error, text):
    with pytest.raises(error, match=text):
        jlora.reconstruct(FACTORS, BASE, **settings)


@pytest.mark.wrong_types
def test_refusals_of_a_pair_and_of_functions():
    pair = jlora.reconstruction.CompensatedWeight(BASE, BASE[:, :4])
    with pytest.raises(ValueError, match=r"`base.low` must have shape \(6, 5\)"):
        jlora.reconstruct(FACTORS, pair)
    with pytest.raises(ValueError, match="`donate` must come with a base"):
        jlora.reconstruction.unmerge(
            FACTORS, jlora.reconstruction.CompensatedWeight(BASE, BASE), donate=True
        )

    with pytest.raises(TypeError, match=r"`function` must be jlora\.reconstruct or"):
        jlora.reconstruction.which_implementation(jlora.updates.balance, FACTORS)
    with pytest.raises(
        ValueError, match="`platform` must be one of 'cpu', 'cuda', 'tpu'"
    ):
        jlora.reconstruction.which_implementation(
            jlora.reconstruct, FACTORS, platform="gpu"
        )
