"""Stochastic and compensated rounding of a merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.factors import multiply_out, to_float64
from tests.helpers.merges import make_case, parametrize_low

KEY = jax.random.key(0)


@parametrize_low
@pytest.mark.parametrize("rank", [3, 40])
def test_stochastic_rounding_is_unbiased_and_reproducible(rank, dtype):
    delta = 1e-4 if dtype == jnp.bfloat16 else 1e-5  # about a step of the dtype at 0.02
    factors, base = make_case((64, 48), rank, dtype, delta=delta)
    exact = to_float64(base) + multiply_out(factors)
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

    # Entries that are exact in the dtype stay, and so do infinities and NaN.
    zero = jax.tree.map(jnp.zeros_like, factors)
    special = base.at[0, :3].set(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], dtype))
    same = jlora.reconstruct(zero, special, rounding="stochastic", key=KEY)
    np.testing.assert_array_equal(to_float64(same)[1:], to_float64(special)[1:])
    assert np.isposinf(to_float64(same)[0, 0])
    assert np.isnan(to_float64(same)[0, 2])


def test_rounding_of_tiny_float16_is_unbiased():
    # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴: a third of a step rounds to one step
    # in a third of all cases.
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
    exact = to_float64(base) + multiply_out(factors)
    merged = jlora.reconstruct(factors, base, rounding="compensated")
    assert isinstance(merged, jlora.reconstruction.CompensatedWeight)
    assert merged.high.dtype == merged.low.dtype == dtype

    both = to_float64(merged.high) + to_float64(merged.low)
    bits = 17 if dtype == jnp.bfloat16 else 22
    assert np.all(np.abs(both - exact) <= 2.0**-bits * np.abs(exact) + 2.0**-24)
    size = np.linalg.norm(multiply_out(factors))
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
