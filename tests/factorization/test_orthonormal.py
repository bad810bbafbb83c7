"""Orthonormal rows, also from rows that are nearly or fully dependent."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.factorization.orthonormal import (
    householder,
    orthonormalize,
    orthonormalize_against,
)
from tests.helpers.accuracy import orthonormality


def random_rows(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((columns, rows)))[0].T


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_orthonormalize_spans_the_same_space_as_householder(condition, scale):
    rng = np.random.default_rng(5)
    y = scale * np.geomspace(1, 1 / condition, 16)[:, None] * random_rows(rng, 16, 500)
    y = jnp.asarray(random_rows(rng, 16, 16) @ y, jnp.float32)
    noise = jnp.asarray(rng.standard_normal((16, 500)), jnp.float32)

    basis = orthonormalize(y, noise)
    assert orthonormality(basis.mT) < 1e-5

    rows = np.asarray(basis)
    remainder = np.asarray(y, np.float64) - (np.asarray(y) @ rows.T) @ rows
    # Dependent rows get 4 eps of noise, which hides any smaller part of them.
    assert np.linalg.norm(remainder) < 1e-5 * np.linalg.norm(y)

    if condition < 1e4:
        overlap = np.linalg.svd(np.asarray(householder(y)) @ rows.T, compute_uv=False)
        assert overlap.min() > 1 - 1e-3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "kind", ["independent", "inside the basis", "parallel", "zero", "mixed"]
)
def test_orthonormalize_against_is_orthogonal_to_both(kind, seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((300, 24)))[0].T

    y = {
        "independent": rng.standard_normal((6, 300)),
        "inside the basis": rng.standard_normal((6, 24)) @ basis,
        "parallel": rng.standard_normal((6, 1)) * rng.standard_normal(300),
        "zero": np.zeros((6, 300)),
        "mixed": np.vstack(
            [
                rng.standard_normal((1, 24)) @ basis,
                np.ones((4, 300)),
                rng.standard_normal((1, 300)),
            ]
        ),
    }[kind]

    basis, y, noise = (
        jnp.asarray(x, jnp.float32) for x in (basis, y, rng.standard_normal((6, 300)))
    )

    # The near part is zero, so the projections remove the whole part inside the
    # basis.
    found = orthonormalize_against(basis, jnp.zeros_like(y), y, noise)
    rows, own_part, near_part, part = found
    assert not np.any(near_part)
    assert orthonormality(jnp.concatenate([basis, rows]).mT) < 1e-5

    together = np.concatenate([basis, rows]).astype(np.float64)
    remainder = np.asarray(y, np.float64) @ (np.eye(300) - together.T @ together)
    assert np.linalg.norm(remainder) <= 1e-5 * np.linalg.norm(y)
    np.testing.assert_allclose(part, y @ basis.mT, atol=1e-3)
    np.testing.assert_allclose(own_part, y @ rows.mT, atol=1e-3)
