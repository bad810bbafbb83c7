"""The SVD of the small matrix in the middle, with vectors orthonormal to working precision.

On a CPU it is LAPACK's, of the part of the space that a symmetric eigenproblem finds the leading
vectors in, where that is measured to suffice. Elsewhere the library SVD is a loop over the batch
(CUDA) or takes minutes to compile (TPU); there it is the polar factor, from matrix products alone,
and one symmetric eigenproblem, which every backend batches. A Gram matrix would lose what lies
below √eps of the largest singular value; this loses nothing above eps of it.

Source: Higham and Papadimitriou, "A new parallel algorithm for computing the singular value
decomposition", 1994, for the road through the polar factor. Differs: the polar factor is
approached by scaled Newton-Schulz steps and need not be reached, see `decompose_by_polar`.
"""

import functools

import jax
import jax.numpy as jnp

from jlora._numerics import (
    is_finite,
    matmul,
    power_of_two_scale,
    safe_divide,
    to_compute,
)
from jlora.factorization.orthonormal import orthonormalize
from jlora.factors import SVD, mask_nonfinite

# Odd quintics a x + b x³ + c x⁵ of the singular values. The first grows small ones 3.4 times and
# keeps what has grown between 0.68 and 1.21 (Jordan et al., "Muon", 2024); thirteen of them bring
# up everything above eps of the largest. The second has f(1) = 1 and f' = f'' = 0 there.
_GROWTH, _NUM_GROWTH_STEPS = (3.4445, -4.7750, 2.0315), 13
_FINISH, _NUM_FINISH_STEPS = (1.875, -1.25, 0.375), 4
_POLAR_STEPS = (_GROWTH,) * _NUM_GROWTH_STEPS + (_FINISH,) * _NUM_FINISH_STEPS

# A core of fewer rows is decomposed whole in a millisecond.
_LEAST_REDUCED = 128
_CORE_OVERSAMPLING = 16


def decompose_core(core, rank, noise, *, is_reduced=True):
    """Return (e [..., L, r], s [..., r], f [..., r, K]), core [..., L, K] ≈ e diag(s) f.

    is_reduced: whether LAPACK may be given the leading part of a large core alone.
    """
    decompose_on_cpu = decompose_by_lapack if is_reduced else _decompose_whole
    finite = jnp.isfinite(core)
    core = jnp.where(finite, core, 0)  # LAPACK may loop on NaN
    return jax.lax.platform_dependent(
        core,
        noise,
        cpu=lambda core, noise: decompose_on_cpu(core, rank),
        default=lambda core, noise: decompose_by_polar(core, rank, noise),
    )


def decompose_by_lapack(core, rank):
    """Return the same from LAPACK: the SVD of the leading part alone where the core is large.

    The eigenvectors of the Gram matrix err by eps (σ_1 / σ_k)²; between each other that is mended
    by the SVD of what they span. What is left, at most 5e-5 of the neighbours of the last one, is
    of no account; where it could be more, the whole core is decomposed.
    """
    width = rank + _CORE_OVERSAMPLING
    if core.shape[-2] < max(_LEAST_REDUCED, 2 * width):
        return _decompose_whole(core, rank)
    _, e = jnp.linalg.eigh(matmul(core, core.mT), symmetrize_input=False)
    e = e[..., ::-1][..., :width]
    inner, s, f = _decompose_whole(matmul(e.mT, core), rank)
    eps = float(jnp.finfo(core.dtype).eps)
    is_resolved = jnp.all(s[..., -1] ** 2 > 2e4 * eps * s[..., 0] ** 2)
    return jax.lax.cond(
        is_resolved,
        lambda: (matmul(e, inner), s, f),
        lambda: _decompose_whole(core, rank),
    )


def _decompose_whole(core, rank):
    e, s, f = jnp.linalg.svd(core, full_matrices=False)
    return e[..., :rank], s[..., :rank], f[..., :rank, :]


def decompose_by_polar(core, rank, noise):
    """Return the same from core = h q, h symmetric: eigenvectors of h are left singular vectors.

    The steps multiply every singular value by its own factor and leave the vectors. Values below
    eps of the largest may not have arrived at one; h still has the right eigenvectors for them,
    to the accuracy that rounding leaves them anyway.
    """
    scale = power_of_two_scale(core)
    core = core / scale
    norm = jnp.linalg.norm(core, axis=(-2, -1), keepdims=True)
    q = safe_divide(core, norm)
    # One loop for both: each that a TPU program holds costs it ten seconds of compilation.
    steps = jnp.asarray(_POLAR_STEPS, core.dtype)
    q = jax.lax.fori_loop(
        0, len(_POLAR_STEPS), lambda i, q: _apply_quintic(q, steps[i]), q
    )
    h = matmul(core, q.mT)
    _, e = jnp.linalg.eigh((h + h.mT) / 2)
    e = e[..., ::-1][..., :rank]
    scaled = matmul(e.mT, core)
    s = jnp.linalg.norm(scaled, axis=-1)
    order = jnp.argsort(s, axis=-1, descending=True)
    e = jnp.take_along_axis(e, order[..., None, :], axis=-1)
    scaled = jnp.take_along_axis(scaled, order[..., None], axis=-2)
    f = orthonormalize(scaled, noise[..., :rank, : core.shape[-1]])
    return e, jnp.take_along_axis(s, order, axis=-1) * scale[..., 0], f


def _apply_quintic(q, coefficients):
    linear, cubic, quintic = coefficients
    gram = matmul(q, q.mT)
    return linear * q + matmul(cubic * gram + quintic * matmul(gram, gram), q)


@functools.partial(jax.jit, static_argnames="rank")
def decompose_fully(a, rank):
    """Return the full decomposition cut to `rank`."""
    a = to_compute(a)
    scale = power_of_two_scale(a)
    finite = is_finite(a)
    # LAPACK may loop or fail on NaN; it gets zeros, and the answer is made NaN afterwards.
    u, s, vt = jnp.linalg.svd(jnp.where(finite, a / scale, 0), full_matrices=False)
    svd = SVD(u[..., :rank], s[..., :rank] * scale[..., 0], vt[..., :rank, :])
    return mask_nonfinite(svd, finite)
