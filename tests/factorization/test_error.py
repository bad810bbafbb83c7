"""Estimates of the error of an SVD and of a sketch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.accuracy import residual
from tests.helpers.matrices import make_float32

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probe_estimate_is_unbiased(dtype):
    a = make_float32("spiked", 200, 160).astype(dtype)
    svd = jlora.truncated_svd(a, 10)
    true = residual(a, svd)

    squares = [
        float(jlora.estimate_error(a, svd, key=jax.random.key(seed))) ** 2 / true**2
        for seed in range(60)
    ]

    std = np.std(squares, ddof=1)
    # Four standard errors of the mean. The documentation states the std of one
    # estimate as a few per cent.
    assert abs(np.mean(squares) - 1) < 4 * std / 60**0.5
    assert std < 0.15


@pytest.mark.parametrize("spectrum", ["spiked", "flat", "exponential"])
def test_leave_one_out_estimate_is_calibrated(spectrum):
    a = make_float32(spectrum, 300, 260)

    ratios = []
    for seed in range(20):
        omega = jax.random.normal(jax.random.key(seed), (260, 24), jnp.float32)
        sketch = jnp.matmul(a, omega, precision="highest")
        q = np.linalg.qr(np.asarray(sketch, np.float64))[0]
        wide = np.asarray(a, np.float64)
        true = np.linalg.norm(wide - q @ (q.T @ wide))
        ratios.append(
            float(jlora.factorization.estimate_sketch_error(sketch, key=KEY)) / true
        )

    # One column less changes the error by ten per cent of a decade on the exponential
    # spectrum, and by next to nothing on the others.
    allowed = (0.7, 2.0) if spectrum == "exponential" else (0.97, 1.05)
    assert allowed[0] < np.mean(ratios) < allowed[1]


@pytest.mark.wrong_types
def test_estimates_refuse():
    a = jnp.ones((30, 20))
    with pytest.raises(ValueError, match="`svd` must have shape"):
        jlora.estimate_error(a, jlora.truncated_svd(a.T, 2), key=KEY)
    with pytest.raises(ValueError, match="`sketch` must have at most as many columns"):
        jlora.factorization.estimate_sketch_error(jnp.ones((3, 4)), key=KEY)
