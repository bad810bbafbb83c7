"""Initializers that read the weight, or nothing at all.

Factors that are not zero are subtracted from the base, in the compute dtype, so that
the adapted weight equals the original up to one rounding.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, eye_like, matmul, to_compute
from jlora.factorization.svd import randomized_svd, truncated_svd
from jlora.factors import SVD, Factors
from jlora.initializers.base import (
    FROM_ZERO_V,
    InitialFactors,
    Initializer,
    split_scaled,
)


def lora() -> Initializer:
    """Return the initializer of LoRA: u uniform in ±1/√m, v zero, the base unchanged.

    The adapted model starts exactly where the plain one is, at no cost. Training has to
    find the directions by itself.

    Source: Hu et al., "LoRA", 2021, with the uniform bound of its reference code.

    Example:
        >>> import jlora
        >>> jlora.Rule("w", 8, init=jlora.initializers.lora()).trainable
        'v'
    """
    return LoRA()


def pissa(*, residual: bool = True) -> Initializer:
    """Return the initializer from the leading singular triplets of the weight.

    √(s / scale) goes on each side. Training then moves the directions in which the
    weight acts most, and usually converges faster than from `lora`.

    Args:
        residual: static. True: the base keeps the rest of the weight. False: it is
            dropped, w ≈ scale * u @ v, as a compression.

    Cost: one `randomized_svd` for each matrix.

    Source: Meng, Wang, Zhang, "PiSSA", 2024.

    Example:
        >>> import jlora
        >>> jlora.initializers.pissa(residual=False).label
        'pissa(residual=False)'
    """
    return PiSSA(residual=residual)


def milora() -> Initializer:
    """Return the initializer from the last singular triplets of the weight.

    √(s / scale) goes on each side. Training moves the directions that the weight uses
    least, so that it forgets less of the old domain.

    Cost: a full decomposition of each matrix.

    Source: Wang, Li, Wang, Chen, Chen, "MiLoRA", 2024.

    Example:
        >>> import jlora
        >>> jlora.initializers.milora().label
        'milora'
    """
    return MiLoRA()


def olora() -> Initializer:
    """Return the initializer from a QR decomposition of the weight.

    With wᵀ = q r, v holds the first rows of qᵀ, which are orthonormal, and u the first
    columns of rᵀ.

    Cost: one QR decomposition of each matrix.

    Source: Büyükakyüz, "OLoRA", 2024.

    Example:
        >>> import jlora
        >>> jlora.initializers.olora().label
        'olora'
    """
    return OLoRA()


def orthogonal() -> Initializer:
    """Return the initializer with two random factors whose product is zero.

    Neither factor is zero, so both have a gradient from the first step. Each is a
    Gaussian of a tenth in one half of a random orthonormal basis. The rank must be
    even.

    Source: the initialisation "orthogonal" of PEFT.

    Example:
        >>> import jlora
        >>> jlora.initializers.orthogonal().rank_multiple
        2
    """
    return Orthogonal()


def lora_xs() -> Initializer:
    """Return the initializer with fixed singular vectors around a trained r×r core.

    u holds the leading left vectors, v the right ones times s, and the core is zero. It
    trains r² numbers per matrix.

    Source: Bałazy, Banaei, Aberer, Tabor, "LoRA-XS", 2024. Differs: the core starts at
    zero instead of a Gaussian of 1e-5, so that the weight is exactly unchanged.

    Example:
        >>> import jlora
        >>> jlora.Rule("w", 8, init="lora_xs").trainable
        'core'
    """
    return LoRAXS()


def svf() -> Initializer:
    """Return the initializer that trains the leading singular values themselves.

    u and v hold the singular vectors, and s / scale lies between them. It trains r
    numbers per matrix.

    Source: Sun, Cetin, Tang, "Transformer-squared", 2025, with all singular values;
    Lingam et al., "SVFT", 2024. Differs: only the leading values are trained, and the
    rest of the weight stays in the base.

    Example:
        >>> import jlora
        >>> jlora.Rule("w", 8, init="svf").trainable
        's'
    """
    return SVF()


class LoRA(Initializer):
    """See `lora`."""

    name = "lora"
    decomposition = "none"
    trainable = FROM_ZERO_V

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del scale, data
        *batch, m, n = w.shape
        dtype = compute_dtype(w.dtype)
        bound = 1 / m**0.5

        u = jax.random.uniform(key, (*batch, m, rank), dtype, -bound, bound)
        return InitialFactors(None, Factors(u, jnp.zeros((*batch, rank, n), dtype)))


@dataclasses.dataclass(frozen=True)
class PiSSA(Initializer):
    """See `pissa`."""

    residual: bool = True

    name = "pissa"
    has_residual_base = True
    passes_nan_on = True

    @property
    def keeps_residual(self) -> bool:
        return self.residual

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del data
        factors = split_scaled(randomized_svd(w, rank, key=key), scale)
        if not self.residual:
            return InitialFactors(None, factors)
        return InitialFactors.from_residual(w, factors, scale)


class MiLoRA(Initializer):
    """See `milora`."""

    name = "milora"
    decomposition = "full"
    has_residual_base = True
    passes_nan_on = True

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del key, data
        u, s, vt = truncated_svd(w, min(w.shape[-2:]))
        minor = SVD(u[..., -rank:], s[..., -rank:], vt[..., -rank:, :])
        return InitialFactors.from_residual(w, split_scaled(minor, scale), scale)


class OLoRA(Initializer):
    """See `olora`."""

    name = "olora"
    decomposition = "full"
    has_residual_base = True
    passes_nan_on = True

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del key, data
        q, r = jnp.linalg.qr(to_compute(w).mT)
        return InitialFactors.from_residual(
            w, Factors(r[..., :rank, :].mT, q[..., :rank].mT), scale
        )


class Orthogonal(Initializer):
    """See `orthogonal`."""

    name = "orthogonal"
    decomposition = "none"
    trainable = ("v", "u", "uv")
    rank_multiple = 2

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del scale, data
        *batch, m, n = w.shape
        dtype = compute_dtype(w.dtype)
        basis_key, u_key, v_key = jax.random.split(key, 3)
        half = rank // 2

        # u and v use different rows of one orthonormal basis, so u @ v is zero.
        gaussian = jax.random.normal(basis_key, (*batch, rank, rank), dtype)
        basis = jnp.linalg.qr(gaussian)[0]
        u_gaussian = jax.random.normal(u_key, (*batch, m, half), dtype)
        v_gaussian = jax.random.normal(v_key, (*batch, n, half), dtype)

        u = matmul(u_gaussian, basis[..., 0::2, :])
        v = matmul(v_gaussian, basis[..., 1::2, :])
        return InitialFactors(None, Factors(u / 10, v.mT / 10))


class LoRAXS(Initializer):
    """See `lora_xs`."""

    name = "lora_xs"
    trainable = ("core",)
    passes_nan_on = True

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del scale, data
        u, s, vt = randomized_svd(w, rank, key=key)
        core = jnp.zeros_like(eye_like(u[..., :rank, :]))
        return InitialFactors(None, Factors(u, s[..., None] * vt), core)


class SVF(Initializer):
    """See `svf`."""

    name = "svf"
    trainable = ("s",)
    passes_nan_on = True

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del data
        u, s, vt = randomized_svd(w, rank, key=key)
        s = s / scale
        scaled = Factors(u * s[..., None, :], vt)
        base = InitialFactors.from_residual(w, scaled, scale).base
        return InitialFactors(base, Factors(u, vt), s)
