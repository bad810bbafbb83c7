"""Cases of updates of an SVD, and the check of their results."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.accuracy import orthonormality
from tests.helpers.factors import DTYPES, dense, to_float64

# Rows, columns, rank, width of the update. In the last three, the rows or the columns
# have no room for all new directions.
SHAPES = [(40, 30, 5, 3), (30, 40, 5, 1), (9, 40, 8, 3), (40, 6, 6, 2), (1, 5, 1, 2)]

parametrize_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

# The updates assume orthonormal vectors, and bfloat16 ones are orthonormal to 4e-3
# only.
FLOATS = [dtype for dtype in DTYPES if dtype != jnp.bfloat16]

parametrize_floats = pytest.mark.parametrize(
    "dtype", FLOATS, ids=lambda dtype: dtype.__name__
)


def check_is_svd_of(svd, expected):
    """Assert that an SVD is exact, sorted and orthonormal."""
    exact = np.linalg.svd(expected, compute_uv=False)
    size = max(exact.max(), np.finfo(np.float32).tiny)
    rank = svd.s.shape[-1]
    assert not np.any(exact[..., rank:] > 1e-5 * size)  # the rank holds all of it

    np.testing.assert_allclose(dense(svd), expected, atol=1e-5 * size)
    np.testing.assert_allclose(svd.s, exact[..., :rank], atol=5e-6 * size)
    assert np.all(np.diff(to_float64(svd.s)) <= 0)
    assert orthonormality(svd.u) < 1e-5
    assert orthonormality(svd.vt.mT) < 1e-5
