"""First factors of a weight: one small function for each method."""

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, to_compute
from jlora.factorization.svd import randomized_svd
from jlora.factors import Factors, split_svd
from jlora.reconstruction.dense import reconstruct


def initialize_lora(w, rank, scale, key):
    """Return (base, factors): u uniform in ±1/√m, v zero, the base as it was.

    Source: Hu et al., "LoRA", 2021, with the uniform bound of its reference code.
    """
    del scale
    *batch, m, n = w.shape
    dtype = compute_dtype(w.dtype)
    bound = 1 / m**0.5
    u = jax.random.uniform(key, (*batch, m, rank), dtype, -bound, bound)
    return w, Factors(u, jnp.zeros((*batch, rank, n), dtype))


def initialize_pissa(w, rank, scale, key):
    """Return (base, factors): √(s / scale) on both sides, and the base what they leave out.

    The subtraction is done in the compute dtype and rounded once to the weight's.

    Source: Meng, Wang, Zhang, "PiSSA", 2024.
    """
    svd = randomized_svd(to_compute(w), rank, key=key)
    u, v = split_svd(svd._replace(s=svd.s / abs(scale)))
    factors = Factors(u if scale > 0 else -u, v)
    return reconstruct(factors, w, scale=-scale), factors


INITIALIZATIONS = {"pissa": initialize_pissa, "lora": initialize_lora}
