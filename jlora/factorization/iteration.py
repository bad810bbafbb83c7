"""The randomised decomposition itself: a basis from Krylov blocks, and the SVD inside it."""

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, is_finite, matmul
from jlora.factorization.core import decompose_core
from jlora.factorization.krylov import krylov_factors
from jlora.factorization.operators import multiply_transposed
from jlora.factorization.sketch import gaussian_sketch
from jlora.factorization.subspace import subspace_factors
from jlora.factors import SVD, mask_nonfinite


def iterate(a, key, warm_start, rank, num_passes, block_size, method="krylov"):
    """Return the SVD of a matrix, or of an `ImplicitProduct`, for sizes of `plan_iteration`."""
    sketch_key, basis_key, core_key = jax.random.split(key, 3)
    omega = _make_omega(
        a, sketch_key, warm_start, block_size, is_odd=num_passes % 2 == 1
    )
    build = krylov_factors if method == "krylov" else subspace_factors
    left, core, right = build(a, omega, num_passes // 2, key=basis_key)
    noise = gaussian_sketch(core_key, rank, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, rank, noise)
    svd = SVD(matmul(e.mT, left).mT, s, matmul(f, right))
    # A number that is not finite in a reaches every coefficient; looking at a itself costs a pass.
    return mask_nonfinite(svd, is_finite(core))


def _make_omega(a, key, warm_start, block_size, *, is_odd):
    """Return the first right block: the start's vectors, then random ones.

    [b, n] where it is random alone, the same for all of a batch; else [..., b, n].
    """
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    dtype = compute_dtype(a.dtype)
    rows = gaussian_sketch(key, block_size, m if is_odd else n, dtype)
    if warm_start is not None or is_odd:
        rows = jnp.broadcast_to(rows, (*batch, *rows.shape))
    if warm_start is not None:
        known = (warm_start.u.mT if is_odd else warm_start.vt)[
            ..., :block_size, :
        ].astype(dtype)
        rows = jnp.concatenate([known, rows[..., known.shape[-2] :, :]], axis=-2)
    return multiply_transposed(a, rows) if is_odd else rows
