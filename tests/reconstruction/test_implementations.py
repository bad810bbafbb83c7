"""The implementations of a merge, and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.reconstruction.implementations import IMPLEMENTATIONS, SumSpec
from tests.helpers.factors import DTYPES, multiply_out, to_float64
from tests.helpers.merges import make_case


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize(
    ("batch", "shape"),
    [((), (1, 1)), ((), (7, 5)), ((), (129, 257)), ((), (4096, 1)), ((2,), (600, 33))],
    ids=str,
)
def test_every_implementation_against_float64(dtype, rank, shape, batch):
    factors, base = make_case(shape, rank, dtype, batch, rms=1.0, delta=1.0)
    expected = to_float64(base) + multiply_out(factors)
    compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
    u, v = (part.astype(compute) for part in factors)

    errors = {}
    for implementation in IMPLEMENTATIONS:
        spec = SumSpec(jnp.dtype(dtype), "nearest", False)
        found = jax.jit(implementation.run, static_argnums=4)((base,), u, v, None, spec)
        assert found.dtype == dtype
        errors[implementation.name] = np.abs(to_float64(found) - expected).max()

    # One rounding to the storage dtype and float32's over `rank` terms. ("cast" rounds
    # twice.)
    tolerance = float(jnp.finfo(dtype).eps) * np.abs(expected).max() / 2 + 1e-5
    assert max(errors.values()) <= 2 * tolerance
    assert max(errors["unrolled"], errors["blocked"], errors["plain"]) <= tolerance


def choose(factors, base, platform, **settings):
    return jlora.reconstruction.which_implementation(
        jlora.reconstruct, factors, base, platform=platform, **settings
    )


def test_which_implementation_is_chosen():
    thin, base = make_case((2048, 64), 8, jnp.bfloat16)
    wide, _ = make_case((2048, 64), 40, jnp.bfloat16)
    platforms = ("cpu", "cuda", "tpu")
    of_thin = [choose(thin, base, platform) for platform in platforms]
    of_wide = [choose(wide, base, platform) for platform in platforms]
    assert of_thin == ["unrolled", "cast", "plain"]
    assert of_wide == ["plain", "cast", "plain"]

    assert choose(thin, base, "cuda", rounding="compensated") == "unrolled"
    assert choose(wide, base, "cpu", donate=True) == "blocked"
    assert choose(wide, base, "cuda", donate=True) == "cast"
    assert choose(wide, base, "cpu", donate=True, columns=3) == "plain"
    assert choose(wide, base, "cuda", rounding="compensated") == "plain"
    assert choose(wide, None, "cuda") == "plain"
    assert choose(thin, base, "tpu", implementation="blocked", donate=True) == "blocked"


def test_the_named_implementation_is_the_one_that_runs():
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
