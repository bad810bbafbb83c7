"""Initializers that read activations, a gradient or a fine-tuned weight."""

from __future__ import annotations

import jax.numpy as jnp

from jlora._numerics import matmul, to_compute
from jlora._types import AnyArray, Array
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors
from jlora.initializers.base import (
    FROM_ZERO_V,
    InitialFactors,
    Initializer,
    split_scaled,
)
from jlora.initializers.second_moments import fit_outputs, take_square_root

_STABLE_GAMMA = 16  # of LoRA-GA


def corda() -> Initializer:
    """Return the initializer that keeps the layer's outputs on given inputs best.

    `data` holds the second moments c = xᵀx of the inputs, [..., m, m], in any multiple.
    With c = rᵀ r the error of the outputs is the norm of r (w − u v). From the SVD
    r w = p s zᵀ the leading z give the optimum u v = w z zᵀ. Nothing is inverted, so c
    may be singular.

    Cost: an eigendecomposition of c and one `randomized_svd` for each matrix.

    Source: Yang et al., "CorDA", 2024; Parkina and Rakhuba, "COALA", 2025, for the
    solution without an inverse. Differs: we scale by c^(1/2) instead of c, which
    minimises the error of the layer's outputs.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.diag(jnp.array([1.0, 2.0, 3.0]))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="corda"))
        >>> moments = {"w": jnp.diag(jnp.array([100.0, 1.0, 1.0]))}
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0), data=moments)
        >>> abs(adapted["w"].v).round(3).tolist()
        [[1.0, 0.0, 0.0]]
    """
    return CorDA()


def eva() -> Initializer:
    """Return the initializer with u from the activations and v zero.

    `data` holds activations [..., t, m]. u gets their leading right singular vectors:
    the directions in which the layer's inputs vary most.

    Source: Paischer et al., "EVA", 2024. Differs: one decomposition of all rows,
        instead
    of an incremental one over batches.

    Example:
        >>> import jlora
        >>> jlora.Rule("w", 8, init="eva").trainable
        'v'
    """
    return EVA()


def lora_ga() -> Initializer:
    """Return the initializer along the gradient of the first step.

    `data` holds a gradient of the weight's shape. u gets its first r left singular
    vectors and v the second r right ones, each scaled to the length n^¼ / √16, the
    stable scale of the method. The base keeps the residual.

    Source: Wang, Yu, Li, "LoRA-GA", 2024, with the direction "ArB2r" and γ = 16.

    Example:
        >>> import jlora
        >>> jlora.initializers.lora_ga().max_rank(64, 32)
        16
    """
    return LoRAGA()


def difference() -> Initializer:
    """Return the initializer that extracts an adapter from a fine-tuned weight.

    `data` holds the fine-tuned weight. The factors are the leading singular triplets of
    `data` − w, and the base stays w, so the adapted weight moves to the fine-tuned one.

    Source: the extraction of a LoRA from a fine-tuned model, as in mergekit and kohya.

    Example:
        >>> import jlora
        >>> jlora.initializers.difference().is_data_stored
        True
    """
    return Difference()


class CorDA(Initializer):
    """See `corda`."""

    name = "corda"
    decomposition = "full"
    has_residual_base = True
    data_meaning = "second moments of the inputs, [..., m, m]"
    passes_nan_on = True

    def data_shape(self, m: int, n: int) -> tuple[int | None, ...]:
        return m, m

    def spectrum_matrix(self, w: Array, data: Array | None) -> Array:
        assert data is not None
        return matmul(*to_compute(take_square_root(data), w))

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        assert data is not None
        exact = to_compute(w)
        factors = fit_outputs(exact, take_square_root(data), rank, scale=scale, key=key)
        return InitialFactors.from_residual(w, factors, scale)


class EVA(Initializer):
    """See `eva`."""

    name = "eva"
    decomposition = "none"
    trainable = FROM_ZERO_V
    data_meaning = "activations, [..., t, m]"
    has_relative_spectrum = True  # explained variance, because activations have a unit

    def data_shape(self, m: int, n: int) -> tuple[int | None, ...]:
        return None, m

    def max_rank(self, m: int, n: int, data: AnyArray | None = None) -> int:
        limit = min(m, n)
        return limit if data is None else min(limit, data.shape[-2])

    def spectrum_matrix(self, w: Array, data: Array | None) -> Array:
        assert data is not None
        return data

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del scale
        assert data is not None
        *batch, _, n = w.shape
        u = randomized_svd(data, rank, key=key).vt.mT.astype(to_compute(w).dtype)
        return InitialFactors(None, Factors(u, jnp.zeros((*batch, rank, n), u.dtype)))


class LoRAGA(Initializer):
    """See `lora_ga`."""

    name = "lora_ga"
    has_residual_base = True
    data_meaning = "the gradient, of the weight's shape"
    is_data_stored = True

    def max_rank(self, m: int, n: int, data: AnyArray | None = None) -> int:
        del data
        return min(m, n) // 2  # u and v take r directions each

    def spectrum_matrix(self, w: Array, data: Array | None) -> Array:
        assert data is not None
        return data

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        assert data is not None
        dtype = to_compute(w).dtype
        u, _, vt = randomized_svd(data, 2 * rank, key=key)
        u, vt = u.astype(dtype), vt.astype(dtype)

        length = w.shape[-1] ** 0.25 / _STABLE_GAMMA**0.5
        factors = Factors(length * u[..., :rank], length * vt[..., rank:, :])
        return InitialFactors.from_residual(w, factors, scale)


class Difference(Initializer):
    """See `difference`."""

    name = "difference"
    data_meaning = "the fine-tuned weight, of the weight's shape"
    is_data_stored = True
    passes_nan_on = True

    def spectrum_matrix(self, w: Array, data: Array | None) -> Array:
        assert data is not None
        return jnp.subtract(*to_compute(data, w))

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        dtype = to_compute(w).dtype
        svd = randomized_svd(self.spectrum_matrix(w, data), rank, key=key)
        svd = SVD(*(part.astype(dtype) for part in svd))
        return InitialFactors(None, split_scaled(svd, scale))
