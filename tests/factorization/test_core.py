"""The SVD of the small core, by LAPACK and by the polar iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.run.matrices import SPECTRA
from jlora.factorization.core import decompose_by_lapack, decompose_by_polar
from tests.helpers.accuracy import optimal_error, orthonormality, residual
from tests.helpers.matrices import make_float32

KEY = jax.random.key(0)


@pytest.mark.parametrize("spectrum", [*SPECTRA])
@pytest.mark.parametrize(
    "num_rows", [48, 160]
)  # LAPACK decomposes 48 rows whole, and reduces 160 rows first
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
