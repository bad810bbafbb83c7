"""Factors that keep a layer's outputs best on given inputs."""

from __future__ import annotations

import jax.numpy as jnp

from jlora._numerics import matmul, safe_divide, to_compute
from jlora._types import Array, Float, PRNGKey, Scalar
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors
from jlora.initializers.base import split_scaled


def take_square_root(
    moments: Float[Array, "*batch m m"],
) -> Float[Array, "*batch m m"]:
    """Return r with rᵀ r = c, for second moments c that may be singular."""
    values, vectors = jnp.linalg.eigh(to_compute(moments))
    return jnp.sqrt(jnp.maximum(values, 0))[..., None] * vectors.mT


def fit_outputs(
    a: Float[Array, "*batch m n"],
    root: Float[Array, "*batch m m"],
    rank: int,
    *,
    scale: Scalar,
    key: PRNGKey,
) -> Factors:
    """Return factors with the least error of the outputs x @ (a - scale * u @ v).

    Args:
        a: in the compute dtype.
        root: square root of the second moments of the inputs x, in any multiple, see
            `take_square_root`.
        rank: static, of the factors.
        scale: of the delta.
        key: one typed PRNG key, consumed.
    """
    z = randomized_svd(matmul(root.astype(a.dtype), a), rank, key=key).vt.mT

    # u v = (a z) zᵀ, with the norms of a z as singular values to balance the factors.
    u = matmul(a, z)
    norms = jnp.linalg.norm(u, axis=-2)
    unit = safe_divide(u, jnp.broadcast_to(norms[..., None, :], u.shape))
    return split_scaled(SVD(unit, norms, z.mT), scale)
