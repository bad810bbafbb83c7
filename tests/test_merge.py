"""Forms of a merge, its roundings, its memory, and the way back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.run.ahead_of_time import compile_elsewhere, why_not
from jlora.reconstruction.implementations import IMPLEMENTATIONS, Spec
from tests.test_updates import DTYPES, make_factors, product

KEY = jax.random.key(0)
LOW = [jnp.bfloat16, jnp.float16]
parametrize_low = pytest.mark.parametrize(
    "dtype", LOW, ids=lambda dtype: dtype.__name__
)


def to_float64(array):
    return np.asarray(array, np.float64)


def make_case(shape, rank, dtype, batch=(), rms=0.02, delta=1e-3):
    """Return (factors, base): a base of that rms and a product of the rms of the delta."""
    base = rms * jax.random.normal(jax.random.key(5), (*batch, *shape), jnp.float32)
    u, v = make_factors(*shape, rank, batch=batch)
    return jlora.Factors(u, v * (delta / rank**0.5)), base.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize(
    ("batch", "shape"),
    [((), (1, 1)), ((), (7, 5)), ((), (129, 257)), ((), (4096, 1)), ((2,), (600, 33))],
    ids=str,
)
def test_every_form_against_float64(dtype, rank, shape, batch):
    factors, base = make_case(shape, rank, dtype, batch, rms=1.0, delta=1.0)
    expected = to_float64(base) + product(factors)
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    u, v = (part.astype(compute) for part in factors)
    errors = {}
    for form in IMPLEMENTATIONS:
        spec = Spec(jnp.dtype(dtype), "nearest", False)
        found = jax.jit(form.run, static_argnums=4)((base,), u, v, None, spec)
        assert found.dtype == dtype
        errors[form.name] = np.abs(to_float64(found) - expected).max()
    # One rounding to the storage dtype and float32's over `rank` terms. ("cast" rounds twice.)
    room = float(jnp.finfo(dtype).eps) * np.abs(expected).max() / 2 + 1e-5
    assert max(errors.values()) <= 2 * room
    assert max(errors["unrolled"], errors["blocked"], errors["plain"]) <= room


def choose(factors, base, platform, **settings):
    return jlora.reconstruction.which_implementation(
        jlora.reconstruct, factors, base, platform=platform, **settings
    )


def test_which_form_is_chosen():
    thin, base = make_case((2048, 64), 8, jnp.bfloat16)
    wide, _ = make_case((2048, 64), 40, jnp.bfloat16)
    assert [choose(thin, base, platform) for platform in ("cpu", "cuda", "tpu")] == [
        "unrolled",
        "cast",
        "plain",
    ]
    assert [choose(wide, base, platform) for platform in ("cpu", "cuda", "tpu")] == [
        "plain",
        "cast",
        "plain",
    ]
    assert choose(thin, base, "cuda", rounding="compensated") == "unrolled"
    assert choose(wide, base, "cpu", donate=True) == "blocked"
    assert choose(wide, base, "cuda", donate=True) == "cast"
    assert choose(wide, base, "cpu", donate=True, columns=3) == "plain"
    assert choose(wide, base, "cuda", rounding="compensated") == "plain"
    assert choose(wide, None, "cuda") == "plain"
    assert choose(thin, base, "tpu", implementation="blocked", donate=True) == "blocked"


def test_the_named_form_is_the_one_that_runs():
    factors, base = make_case((1100, 33), 8, jnp.float32)

    def count_loops(**settings):
        program = jax.jit(lambda f, w: jlora.reconstruct(f, w, **settings))
        return program.lower(factors, base).as_text().count("stablehlo.while")

    assert count_loops(donate=True, implementation="blocked") > 0
    assert count_loops(implementation="unrolled") == 0
    dots = jax.jit(lambda f, w: jlora.reconstruct(f, w)).lower(factors, base).as_text()
    assert "dot_general" not in dots  # unrolled: rank 8
    plain = jax.jit(lambda f, w: jlora.reconstruct(f, w, implementation="plain"))
    assert "dot_general" in plain.lower(factors, base).as_text()


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
    # The factors in float32, and a few blocks of rows: a quarter of the float32 product.
    assert memory.temp_size_in_bytes <= 4 * (2048 + 256) * rank + 4 * 2048 * 256 / 2
    columns = jnp.array(kept)
    jlora.reconstruct(factors, columns, columns=[3, 1], donate=True)
    assert columns.is_deleted()


@parametrize_low
@pytest.mark.parametrize("rank", [3, 40])
def test_stochastic_rounding_is_unbiased_and_reproducible(rank, dtype):
    delta = 1e-4 if dtype == jnp.bfloat16 else 1e-5  # about a step of the dtype at 0.02
    factors, base = make_case((64, 48), rank, dtype, delta=delta)
    exact = to_float64(base) + product(factors)
    keys = jax.random.split(KEY, 64)

    def merge(key):
        return jlora.reconstruct(factors, base, rounding="stochastic", key=key)

    each = to_float64(jax.vmap(merge)(keys))
    assert bool((merge(keys[3]) == merge(keys[3])).all())
    assert bool((merge(keys[3]) != merge(keys[4])).any())
    # Each is one of the two neighbours.
    low, high = (np.minimum, np.maximum)
    spacing = low(np.spacing(np.abs(exact).astype(dtype)).astype(np.float64), 1)
    assert np.all(
        np.abs(each - exact) <= high(spacing, 2.0**-24 if dtype == jnp.float16 else 0)
    )
    # Over all entries and keys: the mean error within four standard errors.
    errors = (each - exact).mean(axis=0)
    deviation = np.std(each - exact) / np.sqrt(len(keys) * exact.size)
    assert abs(errors.mean()) < 4 * deviation
    nearest = to_float64(jlora.reconstruct(factors, base))
    assert np.linalg.norm(errors) < 0.3 * np.linalg.norm(nearest - exact)
    # What is exact in the dtype stays, and so does what is not finite.
    zero = jax.tree.map(jnp.zeros_like, factors)
    special = base.at[0, :3].set(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], dtype))
    same = jlora.reconstruct(zero, special, rounding="stochastic", key=KEY)
    np.testing.assert_array_equal(to_float64(same)[1:], to_float64(special)[1:])
    assert np.isposinf(to_float64(same)[0, 0])
    assert np.isnan(to_float64(same)[0, 2])


def test_rounding_of_tiny_float16_is_unbiased():
    # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴: a third of a step is one step in a third of all cases.
    factors = jlora.Factors(jnp.full((200, 1), 2.0**-24 / 3), jnp.ones((1, 200)))
    base = jnp.zeros((200, 200), jnp.float16)
    steps = (
        to_float64(jlora.reconstruct(factors, base, rounding="stochastic", key=KEY))
        * 2.0**24
    )
    assert set(np.unique(steps)) == {0.0, 1.0}
    assert abs(steps.mean() - 1 / 3) < 4 * np.sqrt(2 / 9 / steps.size)


@parametrize_low
def test_compensated_rounding_carries_both_parts(dtype):
    factors, base = make_case((128, 96), 16, dtype, delta=1e-4)
    exact = to_float64(base) + product(factors)
    merged = jlora.reconstruct(factors, base, rounding="compensated")
    assert isinstance(merged, jlora.reconstruction.CompensatedWeight)
    assert merged.high.dtype == merged.low.dtype == dtype
    both = to_float64(merged.high) + to_float64(merged.low)
    bits = 17 if dtype == jnp.bfloat16 else 22
    assert np.all(np.abs(both - exact) <= 2.0**-bits * np.abs(exact) + 2.0**-24)
    size = np.linalg.norm(product(factors))
    assert np.linalg.norm(both - exact) <= 1e-2 * size
    nearest = to_float64(jlora.reconstruct(factors, base))
    if dtype == jnp.bfloat16:
        assert 0.2 < np.linalg.norm(nearest - exact) / size < 0.5
    # Many small updates: a plain weight loses them, the pair does not.
    small = jlora.Factors(factors.u, factors.v / 64)
    pair, plain = jlora.reconstruct(small, base, rounding="compensated"), base
    for _ in range(63):
        pair = jlora.reconstruct(small, pair, rounding="compensated")
    for _ in range(64):
        plain = jlora.reconstruct(small, plain)
    pair = to_float64(pair.high) + to_float64(pair.low)
    assert np.linalg.norm(pair - exact) < 0.1 * size
    if dtype == jnp.bfloat16:
        assert np.linalg.norm(to_float64(plain) - exact) > 0.5 * size


def test_unmerge_is_the_way_back():
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
    is_held = np.abs(product(factors)) < ratio * np.abs(to_float64(base))
    assert is_held.mean() > 0.99
    same = np.asarray(back).view(np.uint16) == np.asarray(base).view(np.uint16)
    assert same[is_held].all()
    left = np.abs(to_float64(back) - to_float64(base))
    assert np.all(left <= 2.0**-16 * np.abs(product(factors)) + 2.0**-24)
    columns = jlora.reconstruct(factors, base, columns=3, rounding="compensated")
    assert not np.any(to_float64(columns.low)[:, :-3])
    np.testing.assert_array_equal(
        to_float64(jlora.reconstruction.unmerge(factors, columns, columns=3))[:, :-3],
        to_float64(base)[:, :-3],
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_derivatives_are_those_of_the_sum(rounding):
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


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, jlora
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 4)
w, x = jax.random.normal(keys[0], (64, 40)), jax.random.normal(keys[3], (16, 64))
u, v = jax.random.normal(keys[1], (64, 20)), jax.random.normal(keys[2], (20, 40))
rows = jax.sharding.NamedSharding(mesh, P("x"))
merge = jax.jit(lambda w, u, v: jlora.reconstruct(jlora.Factors(u, v), w))
placed = [jax.device_put(w, rows), jax.device_put(u, rows), v]
assert "all-gather" not in merge.lower(*placed).compile().as_text()
merged = merge(*placed)
assert merged.sharding.is_equivalent_to(rows, 2)
np.testing.assert_allclose(merged, w + u @ v, rtol=1e-5, atol=1e-4)
local = jax.shard_map(lambda w, u, v: jlora.reconstruct(jlora.Factors(u, v), w), mesh=mesh,
                      in_specs=(P("x"), P("x"), P()), out_specs=P("x"))
np.testing.assert_allclose(local(w, u, v), w + u @ v, rtol=1e-5, atol=1e-4)
gradient = jax.grad(lambda u: jnp.sum(local(w, u, v) ** 2))(u)
np.testing.assert_allclose(gradient, 2 * (w + u @ v) @ v.T, rtol=1e-4, atol=1e-2)
apply = jax.shard_map(lambda x, w, u, v: jlora.apply_factors(x, jlora.Factors(u, v), w), mesh=mesh,
                      in_specs=(P("x"), P(), P(), P()), out_specs=P("x"))
np.testing.assert_allclose(apply(x, w, u, v), x @ (w + u @ v), rtol=1e-4, atol=1e-2)
gradient = jax.grad(lambda v: jnp.sum(apply(x, w, u, v)))(v)
np.testing.assert_allclose(gradient, (x @ u).T @ jnp.ones((16, 40)), rtol=1e-4, atol=1e-2)
print("done")
"""


def test_over_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]


@pytest.mark.parametrize("target", ["H200", "TPU v5e"])
def test_a_donated_merge_compiled_for_an_accelerator_is_one_kernel(target):
    if reason := why_not(target):
        pytest.skip(reason)
    for program in ("reconstruct bfloat16, rank 16", "reconstruct bfloat16, rank 64"):
        found = compile_elsewhere(target, program)
        assert found["temporary_bytes"] == 0
        assert found["alias_bytes"] == 2 * 4096 * 4096
        assert found["num_kernels"] == 1


FACTORS, BASE = make_case((6, 5), 3, jnp.bfloat16)


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
            "got 'blocked', which keeps the dtype of one base, rounded to the nearest",
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
