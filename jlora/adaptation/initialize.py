"""First factors of a weight: one small function for each method.

Each returns (base, factors). Where the factors are not zero the base is what they leave out,
w - scale * u @ v, subtracted in the compute dtype and rounded once to the weight's.
"""

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, matmul, to_compute
from jlora.factorization.svd import randomized_svd, truncated_svd
from jlora.factors import SVD, Factors, split_svd
from jlora.reconstruction.dense import reconstruct


def initialize_lora(w, rank, scale, key):
    """Return u uniform in ±1/√m, v zero, the base as it was.

    Source: Hu et al., "LoRA", 2021, with the uniform bound of its reference code.
    """
    del scale
    *batch, m, n = w.shape
    dtype = compute_dtype(w.dtype)
    bound = 1 / m**0.5
    u = jax.random.uniform(key, (*batch, m, rank), dtype, -bound, bound)
    return w, Factors(u, jnp.zeros((*batch, rank, n), dtype))


def initialize_pissa(w, rank, scale, key):
    """Return the leading singular triplets, √(s / scale) on both sides.

    Source: Meng, Wang, Zhang, "PiSSA", 2024.
    """
    return _take_out(w, _split_scaled(randomized_svd(to_compute(w), rank, key=key), scale), scale)


def initialize_milora(w, rank, scale, key):
    """Return the last singular triplets, √(s / scale) on both sides: a full decomposition.

    Source: Wang, Li, Wang, Chen, Chen, "MiLoRA", 2024.
    """
    del key
    u, s, vt = truncated_svd(to_compute(w), min(w.shape[-2:]))
    minor = SVD(u[..., -rank:], s[..., -rank:], vt[..., -rank:, :])
    return _take_out(w, _split_scaled(minor, scale), scale)


def initialize_olora(w, rank, scale, key):
    """Return v the leading rows of an orthonormal basis of the outputs, u the weight in it.

    Of the QR decomposition wᵀ = q r, v is qᵀ and u is rᵀ, both cut to the rank.

    Source: Büyükakyüz, "OLoRA", 2024.
    """
    del key
    q, r = jnp.linalg.qr(to_compute(w).mT)
    return _take_out(w, Factors(r[..., :rank, :].mT, q[..., :rank].mT), scale)


def initialize_orthogonal(w, rank, scale, key):
    """Return random factors of product zero, neither of them zero; the rank is even.

    Both are Gaussian, a tenth in size, in one half each of a random orthonormal basis.

    Source: the initialisation "orthogonal" of PEFT.
    """
    del scale
    *batch, m, n = w.shape
    dtype = compute_dtype(w.dtype)
    basis_key, u_key, v_key = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (*batch, rank, rank), dtype))[0]
    u = matmul(jax.random.normal(u_key, (*batch, m, rank // 2), dtype), basis[..., 0::2, :])
    v = matmul(jax.random.normal(v_key, (*batch, n, rank // 2), dtype), basis[..., 1::2, :])
    return w, Factors(u / 10, v.mT / 10)


def _split_scaled(svd, scale):
    """Return factors with scale * u @ v equal to the matrix of the SVD, balanced."""
    u, v = split_svd(svd._replace(s=svd.s / abs(scale)))
    return Factors(u if scale > 0 else -u, v)


def _take_out(w, factors, scale):
    return reconstruct(factors, w, scale=-scale), factors


INITIALIZATIONS = {
    "pissa": initialize_pissa, "lora": initialize_lora, "milora": initialize_milora,
    "olora": initialize_olora, "orthogonal": initialize_orthogonal,
}  # fmt: skip
