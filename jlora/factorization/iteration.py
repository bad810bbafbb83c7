"""One randomised decomposition, from the first random block to the SVD.

Multiply a random block by the matrix and its transpose, project the matrix onto the
spaces that the products span, and decompose the small projected matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, is_finite
from jlora._types import Array, Float, PRNGKey
from jlora.factorization.krylov import project_onto_krylov
from jlora.factorization.operators import Matrix, multiply_transposed
from jlora.factorization.projection import decompose_projection
from jlora.factorization.sketch import gaussian_sketch
from jlora.factorization.subspace import project_onto_subspace
from jlora.factors import SVD, mask_nonfinite


def decompose_randomly(
    a: Matrix,
    key: PRNGKey,
    warm_start: SVD | None,
    rank: int,
    num_passes: int,
    block_size: int,
    method: str = "krylov",
) -> SVD:
    """Return the leading `rank` triplets of a matrix or operator.

    `num_passes` and `block_size` are those that `plan_iteration` returns.
    """
    sketch_key, basis_key, core_key = jax.random.split(key, 3)
    is_odd = num_passes % 2 == 1
    omega = _make_omega(a, sketch_key, warm_start, block_size, is_odd=is_odd)

    project = project_onto_krylov if method == "krylov" else project_onto_subspace
    projection = project(a, omega, num_passes // 2, key=basis_key)

    svd = decompose_projection(projection, rank, key=core_key)
    # A NaN or Inf in `a` reaches every entry of the core. Reading `a` itself costs a
    # pass.
    return mask_nonfinite(svd, is_finite(projection.core))


def _make_omega(
    a: Matrix,
    key: PRNGKey,
    warm_start: SVD | None,
    block_size: int,
    *,
    is_odd: bool,
) -> Float[Array, "... b n"]:
    """Return the first right block: vectors of `warm_start` first, then random rows.

    An odd number of passes spends the first one here: the rows are multiplied by `a`.
    The shape is [b, n] if all rows are random and unmultiplied, because the batch then
    shares them. Otherwise it is [..., b, n].
    """
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    dtype = compute_dtype(a.dtype)
    rows = gaussian_sketch(key, block_size, m if is_odd else n, dtype)
    if warm_start is None and not is_odd:
        return rows

    rows = jnp.broadcast_to(rows, (*batch, *rows.shape))
    if warm_start is not None:
        known = warm_start.u.mT if is_odd else warm_start.vt
        known = known[..., :block_size, :].astype(dtype)
        rows = jnp.concatenate([known, rows[..., known.shape[-2] :, :]], axis=-2)
    return multiply_transposed(a, rows) if is_odd else rows
