"""The full SVD of a matrix, truncated.

It is the reference of every faster method. It is also the cheaper method if a random
projection would need a basis as wide as the matrix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jlora._numerics import is_finite, power_of_two_scale, to_compute
from jlora._sharding import follow_axes
from jlora._types import Array, Float
from jlora.factors import NEW_SVD_AXES, SVD, mask_nonfinite


@functools.partial(jax.jit, static_argnames="rank")
@follow_axes("*b m n", result=NEW_SVD_AXES)
def decompose_fully(a: Float[Array, "*batch m n"], rank: int) -> SVD:
    """Return the full decomposition in the compute dtype, truncated to `rank`."""
    a = to_compute(a)
    scale = power_of_two_scale(a)
    finite = is_finite(a)

    # LAPACK may loop or fail on NaN. It gets zeros, and the result is set to NaN below.
    u, s, vt = jnp.linalg.svd(jnp.where(finite, a / scale, 0), full_matrices=False)
    svd = SVD(u[..., :rank], s[..., :rank] * scale[..., 0], vt[..., :rank, :])
    return mask_nonfinite(svd, finite)
