"""First factors that look at more than the weight: a quantiser, data, a gradient, a fine-tune.

The functions are as those of initialize.py; `data` says what they are given beside the weight.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import matmul, safe_divide, to_compute
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors
from jlora.initializers.base import Start, split_scaled, take_out
from jlora.reconstruction.dense import reconstruct

_STABLE_GAMMA = 16  # of LoRA-GA


def initialize_qpissa(w, rank, scale, key, data=None, *, quantize, num_rounds=1):
    """Return the leading singular triplets, and a base that holds the rest as a quantiser can.

    Each further round decomposes w minus the quantised base, and quantises what that leaves out.

    Source: Meng, Wang, Zhang, "PiSSA", 2024, section on QPiSSA.
    """
    del data
    return _alternate(w, None, rank, scale, key, quantize, num_rounds)


def initialize_loftq(w, rank, scale, key, data=None, *, quantize, num_rounds=1):
    """Return the leading triplets of what quantising w left out, and that quantised base.

    Each further round quantises w minus the product of the factors, and decomposes again.

    Source: Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, "LoftQ", 2023, algorithm 1.
    """
    del data
    exact, (key, last_key) = to_compute(w), jax.random.split(key)
    base = quantize(exact)
    if num_rounds > 1:
        base = _alternate(exact, base, rank, scale, key, quantize, num_rounds - 1).base
    svd = randomized_svd(exact - base, rank, key=last_key)
    return Start(base.astype(w.dtype), split_scaled(svd, scale))


def _alternate(w, base, rank, scale, key, quantize, num_rounds):
    """Return the `Start` after rounds of decomposing w - base and quantising what that leaves."""
    exact = to_compute(w)
    for own_key in jax.random.split(key, num_rounds):
        left = exact if base is None else exact - base
        factors = split_scaled(randomized_svd(left, rank, key=own_key), scale)
        base = quantize(reconstruct(factors, exact, scale=-scale))
    return Start(base.astype(w.dtype), factors)


def initialize_corda(w, rank, scale, key, data):
    """Return the best factors of w for inputs of the given second moments [..., m, m].

    With c = rᵀ r the second moments, the error of the outputs is that of r w. Of r w = p s zᵀ the
    leading z give it: u v = w z zᵀ. Nothing is inverted, so c may be singular.

    Source: Yang et al., "CorDA", 2024; Parkina and Rakhuba, "COALA", 2025, for the way without an
    inverse. Differs: CorDA weights with c itself, and this with its square root, for which the
    error is that of the outputs.
    """
    exact = to_compute(w)
    z = randomized_svd(
        matmul(square_root(data).astype(exact.dtype), exact), rank, key=key
    ).vt.mT
    u = matmul(exact, z)
    norms = jnp.linalg.norm(u, axis=-2)
    unit = safe_divide(u, jnp.broadcast_to(norms[..., None, :], u.shape))
    return take_out(w, split_scaled(SVD(unit, norms, z.mT), scale), scale)


def square_root(moments):
    """Return r with rᵀ r = c, for second moments c [..., m, m] that may be singular."""
    values, vectors = jnp.linalg.eigh(to_compute(moments))
    return jnp.sqrt(jnp.maximum(values, 0))[..., None] * vectors.mT


def initialize_eva(w, rank, scale, key, data):
    """Return u the leading right singular vectors of activations [..., t, m], v zero.

    Source: Paischer et al., "EVA", 2024. Differs: one decomposition of all rows, not one of each
    batch folded into the last.
    """
    del scale
    *batch, _, n = w.shape
    u = randomized_svd(data, rank, key=key).vt.mT.astype(to_compute(w).dtype)
    return Start(None, Factors(u, jnp.zeros((*batch, rank, n), u.dtype)))


def initialize_lora_ga(w, rank, scale, key, data):
    """Return u the first r and v the second r singular directions of a gradient [..., m, n].

    Both are n^¼ / √16 long, the method's stable scale; the base gives way to their product.

    Source: Wang, Yu, Li, "LoRA-GA", 2024, with the direction "ArB2r" and γ = 16.
    """
    u, _, vt = randomized_svd(data, 2 * rank, key=key)
    size = w.shape[-1] ** 0.25 / _STABLE_GAMMA**0.5
    dtype = to_compute(w).dtype
    u, vt = u.astype(dtype), vt.astype(dtype)
    return take_out(w, Factors(size * u[..., :rank], size * vt[..., rank:, :]), scale)


def initialize_difference(w, rank, scale, key, data):
    """Return the leading triplets of a fine-tuned weight minus w; the base is w as it was.

    Source: the extraction of a LoRA from a fine-tuned model, as mergekit and kohya do it.
    """
    difference = jnp.subtract(*to_compute(data, w))
    svd = randomized_svd(difference, rank, key=key)
    svd = SVD(*(part.astype(to_compute(w).dtype) for part in svd))
    return Start(None, split_scaled(svd, scale))
