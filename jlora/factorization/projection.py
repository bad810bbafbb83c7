"""A matrix projected onto a left and a right basis, and its SVD."""

from __future__ import annotations

from typing import NamedTuple

from jlora._numerics import matmul
from jlora._types import Array, Float, PRNGKey
from jlora.factorization.core import decompose_core
from jlora.factorization.sketch import gaussian_sketch
from jlora.factors import SVD


class Projection(NamedTuple):
    """a ≈ leftᵀ @ core @ right. Rows that are not filled yet are zero."""

    left: Float[Array, "*batch L m"]  # orthonormal or zero rows
    core: Float[Array, "*batch L K"]  # L ≤ K
    right: Float[Array, "*batch K n"]  # orthonormal or zero rows


def decompose_projection(projection: Projection, rank: int, *, key: PRNGKey) -> SVD:
    """Return the leading `rank` triplets of the projected matrix."""
    left, core, right = projection
    noise = gaussian_sketch(key, rank, core.shape[-1], core.dtype)
    inner = decompose_core(core, rank, noise)
    return SVD(matmul(inner.u.mT, left).mT, inner.s, matmul(inner.vt, right))
