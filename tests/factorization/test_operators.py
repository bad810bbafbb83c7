"""Products with a matrix stored in 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.factorization.operators import multiply, multiply_transposed

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_split_products_are_as_exact_as_float32(dtype):
    a = jax.random.normal(KEY, (2, 130, 90), jnp.float32).astype(dtype)
    rows = jlora.truncated_svd(jax.random.normal(KEY, (2, 130, 90), jnp.float32), 7)
    wide = np.asarray(a, np.float64)
    right, left = np.asarray(rows.vt, np.float64), np.asarray(rows.u.mT, np.float64)

    for found, exact in (
        (multiply(a, rows.vt), right @ wide.mT),
        (multiply_transposed(a, rows.u.mT), left @ wide),
    ):
        assert found.dtype == jnp.float32
        # Three parts hold 24 bits; the sum over 130 terms rounds like any float32
        # product.
        assert np.linalg.norm(np.asarray(found) - exact) < 1e-6 * np.linalg.norm(exact)
