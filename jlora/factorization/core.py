"""The SVD of a core: the small matrix between two orthonormal bases.

On CPU we call LAPACK's SVD. A large core is first projected onto the leading
eigenvectors of its Gram matrix if that loses no accuracy (see `decompose_by_lapack`).

On other backends the library SVD is a loop over the batch (CUDA) or takes minutes to
compile (TPU). There we compute the polar factor by matrix products, and then solve one
symmetric eigenproblem, which every backend batches. This resolves singular values down
to eps of the largest. A Gram matrix would resolve them only down to √eps.

Source: Higham and Papadimitriou, "A new parallel algorithm for computing the singular
value decomposition", 1994, for the SVD by way of the polar factor. Differs: scaled
Newton-Schulz steps approach the polar factor and need not reach it, see
`decompose_by_polar`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jlora._numerics import matmul, power_of_two_scale, safe_divide
from jlora._types import Array, Float
from jlora.factorization.orthonormal import orthonormalize
from jlora.factors import SVD

# Odd quintics a x + b x³ + c x⁵, applied to the singular values x. The first multiplies
# small values by 3.4 and keeps larger ones between 0.68 and 1.21 (Jordan et al.,
# "Muon", 2024). Thirteen of them lift everything above eps of the largest into that
# range. The second has f(1) = 1 and f'(1) = f''(1) = 0, so it converges to one.
_GROWTH, _NUM_GROWTH_STEPS = (3.4445, -4.7750, 2.0315), 13
_FINISH, _NUM_FINISH_STEPS = (1.875, -1.25, 0.375), 4
_POLAR_STEPS = (_GROWTH,) * _NUM_GROWTH_STEPS + (_FINISH,) * _NUM_FINISH_STEPS

# LAPACK decomposes a core with fewer rows in a millisecond.
_MIN_REDUCED_ROWS = 128
_CORE_OVERSAMPLING = 16


def decompose_core(
    core: Float[Array, "*batch L K"],
    rank: int,
    noise: Float[Array, "_ K"],
    *,
    is_reduced: bool = True,
) -> SVD:
    """Return the leading `rank` triplets of each core.

    Args:
        core: entries that are not finite count as zero.
        rank: static, at most min(L, K).
        noise: standard normal, with at least `rank` rows, shared by the batch.
        is_reduced: static. Whether LAPACK may decompose a large core after a projection
            onto its leading part.
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


def decompose_by_lapack(core: Float[Array, "*batch L K"], rank: int) -> SVD:
    """Return the leading triplets by LAPACK, from a reduced core if it is large.

    The reduction projects the core onto the leading eigenvectors of its Gram matrix.
    These have error eps (σ₁ / σₖ)², with k = `rank`. The SVD of the projected core
    corrects mixing among the leading ones. The last ones still mix with their
    discarded neighbours, by at most 5e-5. If that could be larger, the whole core is
    decomposed.
    """
    width = rank + _CORE_OVERSAMPLING
    if core.shape[-2] < max(_MIN_REDUCED_ROWS, 2 * width):
        return _decompose_whole(core, rank)

    # Project onto the leading eigenvectors; eigh sorts in ascending order.
    unit = core / power_of_two_scale(core)  # or its squares leave the dtype's range
    _, e = jnp.linalg.eigh(matmul(unit, unit.mT), symmetrize_input=False)
    e = e[..., ::-1][..., :width]
    reduced = _decompose_whole(matmul(e.mT, core), rank)

    eps = float(jnp.finfo(core.dtype).eps)
    s = reduced.s
    # A zero core needs no second try, and must not cause one for the batch it is in.
    is_zero = s[..., 0] == 0
    ratio = safe_divide(s[..., -1], s[..., 0])
    is_resolved = jnp.all(is_zero | (ratio**2 > 2e4 * eps))
    return jax.lax.cond(
        is_resolved,
        lambda: reduced._replace(u=matmul(e, reduced.u)),
        lambda: _decompose_whole(core, rank),
    )


def _decompose_whole(core: Float[Array, "*batch L K"], rank: int) -> SVD:
    """Return the library's SVD of the core, truncated."""
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    return SVD(u[..., :rank], s[..., :rank], vt[..., :rank, :])


def decompose_by_polar(
    core: Float[Array, "*batch L K"], rank: int, noise: Float[Array, "_ K"]
) -> SVD:
    """Return the leading triplets by way of the polar decomposition core = h q.

    The eigenvectors of the symmetric h are the left singular vectors of the core. A
    Newton-Schulz step changes the singular values of q, and keeps its singular vectors.
    Values below eps of the largest may not reach one. The eigenvectors of h are right
    for these too, as accurately as rounding allows.
    """
    scale = power_of_two_scale(core)
    core = core / scale

    # The polar factor q. One loop for both polynomials: each loop in a TPU program adds
    # ten seconds of compilation.
    q = safe_divide(core, jnp.linalg.norm(core, axis=(-2, -1), keepdims=True))
    steps = jnp.asarray(_POLAR_STEPS, core.dtype)
    num_steps = len(_POLAR_STEPS)
    q = jax.lax.fori_loop(0, num_steps, lambda i, q: _apply_quintic(q, steps[i]), q)

    # The left vectors; eigh sorts in ascending order.
    h = matmul(core, q.mT)
    _, e = jnp.linalg.eigh((h + h.mT) / 2)
    e = e[..., ::-1][..., :rank]

    # The singular values, sorted again: h has only approximately the same ones.
    scaled_vt = matmul(e.mT, core)
    s = jnp.linalg.norm(scaled_vt, axis=-1)
    order = jnp.argsort(s, axis=-1, descending=True)
    e = jnp.take_along_axis(e, order[..., None, :], axis=-1)
    scaled_vt = jnp.take_along_axis(scaled_vt, order[..., None], axis=-2)

    vt = orthonormalize(scaled_vt, noise[:rank])
    return SVD(e, jnp.take_along_axis(s, order, axis=-1) * scale[..., 0], vt)


def _apply_quintic(
    q: Float[Array, "*batch L K"], coefficients: Float[Array, 3]
) -> Float[Array, "*batch L K"]:
    """Return q with its singular values x replaced by a x + b x³ + c x⁵."""
    linear, cubic, quintic = coefficients
    gram = matmul(q, q.mT)
    return linear * q + matmul(cubic * gram + quintic * matmul(gram, gram), q)
