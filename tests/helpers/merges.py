"""Factors and bases to merge."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests.helpers.factors import make_factors

LOW = [jnp.bfloat16, jnp.float16]

parametrize_low = pytest.mark.parametrize(
    "dtype", LOW, ids=lambda dtype: dtype.__name__
)


def make_base(shape, dtype, batch=()):
    return jax.random.normal(jax.random.key(5), (*batch, *shape), jnp.float32).astype(
        dtype
    )


def make_case(shape, rank, dtype, batch=(), rms=0.02, delta=1e-3):
    """Return (factors, base) with these rms of the base and of the product."""
    base = rms * jax.random.normal(jax.random.key(5), (*batch, *shape), jnp.float32)
    u, v = make_factors(*shape, rank, batch=batch)
    return jlora.Factors(u, v * (delta / rank**0.5)), base.astype(dtype)
