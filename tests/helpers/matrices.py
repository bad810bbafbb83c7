"""Test matrices in float32, and the tests that need float64."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.run.matrices import make_matrix

X64 = jax.config.jax_enable_x64

needs_x64 = pytest.mark.skipif(
    not X64, reason="differences of 1e-6 need JAX_ENABLE_X64=1"
)


def make_float32(spectrum, m, n, layer=0):
    return jnp.asarray(make_matrix(spectrum, m, n, layer), jnp.float32)
