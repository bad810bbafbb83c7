"""First factors of a weight: one small function for each method.

Each takes (w, rank, scale, key, data) for one matrix w [m, n], or a batch of them, and returns a
`Start`. `scale` may be traced. Where the factors are not zero the base is what they leave out,
w - scale * u @ v, subtracted in the compute dtype and rounded once to the weight's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, eye_like, matmul, to_compute
from jlora.factorization.svd import randomized_svd, truncated_svd
from jlora.factors import SVD, Factors
from jlora.initializers import from_data
from jlora.initializers.base import Start, split_scaled, take_out

PARTS = ("v", "u", "uv", "core", "s")


def initialize_lora(w, rank, scale, key, data=None):
    """Return u uniform in ±1/√m, v zero, the base as it was.

    Source: Hu et al., "LoRA", 2021, with the uniform bound of its reference code.
    """
    del scale, data
    *batch, m, n = w.shape
    dtype = compute_dtype(w.dtype)
    bound = 1 / m**0.5
    u = jax.random.uniform(key, (*batch, m, rank), dtype, -bound, bound)
    return Start(None, Factors(u, jnp.zeros((*batch, rank, n), dtype)))


def initialize_pissa(w, rank, scale, key, data=None):
    """Return the leading singular triplets, √(s / scale) on both sides.

    Source: Meng, Wang, Zhang, "PiSSA", 2024.
    """
    del data
    return take_out(w, split_scaled(randomized_svd(w, rank, key=key), scale), scale)


def initialize_milora(w, rank, scale, key, data=None):
    """Return the last singular triplets, √(s / scale) on both sides: a full decomposition.

    Source: Wang, Li, Wang, Chen, Chen, "MiLoRA", 2024.
    """
    del key, data
    u, s, vt = truncated_svd(w, min(w.shape[-2:]))
    minor = SVD(u[..., -rank:], s[..., -rank:], vt[..., -rank:, :])
    return take_out(w, split_scaled(minor, scale), scale)


def initialize_olora(w, rank, scale, key, data=None):
    """Return v the leading rows of an orthonormal basis of the outputs, u the weight in it.

    Of the QR decomposition wᵀ = q r, v is qᵀ and u is rᵀ, both cut to the rank.

    Source: Büyükakyüz, "OLoRA", 2024.
    """
    del key, data
    q, r = jnp.linalg.qr(to_compute(w).mT)
    return take_out(w, Factors(r[..., :rank, :].mT, q[..., :rank].mT), scale)


def initialize_orthogonal(w, rank, scale, key, data=None):
    """Return random factors of product zero, neither of them zero; the rank is even.

    Both are Gaussian, a tenth in size, in one half each of a random orthonormal basis.

    Source: the initialisation "orthogonal" of PEFT.
    """
    del scale, data
    *batch, m, n = w.shape
    dtype = compute_dtype(w.dtype)
    basis_key, u_key, v_key = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (*batch, rank, rank), dtype))[0]
    u = matmul(
        jax.random.normal(u_key, (*batch, m, rank // 2), dtype), basis[..., 0::2, :]
    )
    v = matmul(
        jax.random.normal(v_key, (*batch, n, rank // 2), dtype), basis[..., 1::2, :]
    )
    return Start(None, Factors(u / 10, v.mT / 10))


def initialize_lora_xs(w, rank, scale, key, data=None):
    """Return the leading singular vectors, s on the right, around a core of zeros.

    Source: Bałazy, Banaei, Aberer, Tabor, "LoRA-XS", 2024. Differs: the core starts at zero and
    not at a Gaussian of 1e-5, so that the weight is exactly what it was.
    """
    del scale, data
    u, s, vt = randomized_svd(w, rank, key=key)
    return Start(
        None, Factors(u, s[..., None] * vt), jnp.zeros_like(eye_like(u[..., :rank, :]))
    )


def initialize_svf(w, rank, scale, key, data=None):
    """Return the leading singular vectors, and s / scale apart, which is what is trained.

    Source: Sun, Cetin, Tang, "Transformer-squared", 2025, of all singular values; Lingam et al.,
    "SVFT", 2024. Differs: the leading ones alone, the rest stays in the base.
    """
    del data
    u, s, vt = randomized_svd(w, rank, key=key)
    s = s / scale
    base = take_out(w, Factors(u * s[..., None, :], vt), scale).base
    return Start(base, Factors(u, vt), s)


class Initialization(NamedTuple):
    """An initialisation, and what has to be known of it."""

    start: Callable  # (w, rank, scale, key, data) -> Start; loftq, qpissa also take two settings
    parts: tuple[
        str, ...
    ]  # what can be trained, the default first: the rest has no gradient
    data: str | None = None  # what `data` holds for it
    data_is_stored: bool = False  # whether `data` has the weight's own shape and layout
    decomposes: str = "w"  # whose singular values its rank is read from
    moves_base: bool = True  # whether it gives a base other than the weight
    sees_weight: bool = True  # whether its factors are made of the weight


_ANY = ("v", "u", "uv", "core", "s")
_FROM_ZERO = ("v", "uv")  # v is zero, so that u and what is between have no gradient

INITIALIZATIONS = {
    "pissa": Initialization(initialize_pissa, _ANY),
    "lora": Initialization(
        initialize_lora, _FROM_ZERO, moves_base=False, sees_weight=False
    ),
    "milora": Initialization(initialize_milora, _ANY),
    "olora": Initialization(initialize_olora, _ANY),
    "orthogonal": Initialization(
        initialize_orthogonal, ("v", "u", "uv"), moves_base=False, sees_weight=False
    ),
    "svf": Initialization(initialize_svf, ("s",)),
    "lora_xs": Initialization(initialize_lora_xs, ("core",), moves_base=False),
    "loftq": Initialization(from_data.initialize_loftq, _ANY),
    "qpissa": Initialization(from_data.initialize_qpissa, _ANY),
    "corda": Initialization(
        from_data.initialize_corda,
        _ANY,
        "second moments of the inputs, [..., m, m]",
        decomposes="weighted",
    ),
    "eva": Initialization(
        from_data.initialize_eva,
        _FROM_ZERO,
        "activations, [..., t, m]",
        decomposes="data",
        moves_base=False,
        sees_weight=False,
    ),
    "lora_ga": Initialization(
        from_data.initialize_lora_ga,
        _ANY,
        "the gradient, of the weight's shape",
        data_is_stored=True,
        decomposes="data",
        sees_weight=False,
    ),
    "difference": Initialization(
        from_data.initialize_difference,
        _ANY,
        "the fine-tuned weight, of the weight's shape",
        data_is_stored=True,
        decomposes="difference",
        moves_base=False,
    ),
}
