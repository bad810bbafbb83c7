"""`Start`: what an initialisation gives, and the two steps that most of them share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora.factors import Factors, split_svd
from jlora.reconstruction.dense import reconstruct


class Start(NamedTuple):
    """A weight as base + scale * u @ v, with something between u and v where `core` is given."""

    base: jax.Array | None  # [..., m, n]; None: the weight itself
    factors: Factors  # u [..., m, r], v [..., r, n]
    core: jax.Array | None = (
        None  # [..., r, r], or [..., r] for a diagonal; None: nothing
    )


def split_scaled(svd, scale):
    """Return factors with scale * u @ v equal to the matrix of the SVD, balanced."""
    u, v = split_svd(svd._replace(s=svd.s / jnp.abs(scale)))
    return Factors(u * jnp.sign(scale).astype(u.dtype), v)


def take_out(w, factors, scale):
    """Return the `Start` of factors that are taken out of the weight."""
    return Start(reconstruct(factors, w, scale=-scale), factors)
