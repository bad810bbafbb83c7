"""The dtypes of at least float32 that this run can compute in."""

import jax
import jax.numpy as jnp
import pytest

FULL_DTYPES = [jnp.float32, *([jnp.float64] if jax.config.jax_enable_x64 else [])]

parametrize_full_dtypes = pytest.mark.parametrize(
    "dtype", FULL_DTYPES, ids=lambda dtype: dtype.__name__
)
