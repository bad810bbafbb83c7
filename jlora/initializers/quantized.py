"""Initializers whose base is rounded to a low-precision format.

`quantize` is a round trip: it maps a weight to the nearest one that the format can
hold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import to_compute
from jlora._types import Array, Float, PRNGKey, Scalar
from jlora.factorization.svd import randomized_svd
from jlora.initializers.base import InitialFactors, Initializer, split_scaled
from jlora.initializers.second_moments import fit_outputs, take_square_root
from jlora.quantization.round_trips import quantize_nf4
from jlora.reconstruction.dense import reconstruct


def loftq(*, num_rounds: int = 1) -> Initializer:
    """Return the initializer from the quantisation error of the weight.

    The base is Q(w), and the factors are the leading singular triplets of w − Q(w).
    Each further round quantises w − u v and decomposes again.

    Args:
        num_rounds: static, how often base and factors are fitted to each other, ≥ 1.

    Source: Li, Yu, Liang, He, Karampatziakis, Chen, Zhao, "LoftQ", 2023, algorithm 1.

    Example:
        >>> import jlora
        >>> jlora.initializers.loftq(num_rounds=5).label
        'loftq(num_rounds=5)'
    """
    return LoftQ(_checks.check_integer(num_rounds, "num_rounds"))


def qpissa(*, num_rounds: int = 1) -> Initializer:
    """Return the initializer from the leading triplets, on a quantised residual.

    The base is Q(w − u v). Each further round decomposes w − base and quantises again.

    Args:
        num_rounds: static, how often base and factors are fitted to each other, ≥ 1.

    Source: Meng, Wang, Zhang, "PiSSA", 2024, section on QPiSSA.

    Example:
        >>> import jlora
        >>> jlora.initializers.qpissa().label
        'qpissa'
    """
    return QPiSSA(_checks.check_integer(num_rounds, "num_rounds"))


def qera(*, num_rounds: int = 1) -> Initializer:
    """Return the initializer that corrects the outputs of the quantised weight best.

    The base is Q(w). `data` holds the second moments c = xᵀx of the inputs,
    [..., m, m], in any multiple. Of all factors of the rank, these make the error of
    the layer's outputs, x @ (w − base − u v), the smallest. With more rounds the base
    is Q(w − u v) for the best factors of the weight itself, and then of what each base
    leaves: the most important part of w stays in the factors and is not quantised.

    Args:
        num_rounds: static, ≥ 1, quantisations; each one after the first decomposes once
            more.

    Raises:
        TypeError, ValueError: a number of rounds that is no integer or below 1.

    Cost: an eigendecomposition of c and one `randomized_svd` a round for each matrix.

    Source: Zhang et al., "QERA: an analytical framework for quantization error
        reconstruction", 2024, theorem 1. Differs: nothing is inverted, so c may be
        singular; see `corda`. More rounds: as QPiSSA, with this norm.

    Example:
        >>> import jlora
        >>> jlora.Rule("w", 8, init="qera", quantize="nf4").initializer.data_meaning
        'second moments of the inputs, [..., m, m]'
    """
    return QERA(_checks.check_integer(num_rounds, "num_rounds"))


@dataclasses.dataclass(frozen=True)
class QuantizedInitializer(Initializer):
    """An initializer with a quantised base; `Rule(quantize=)` sets its `quantize`."""

    num_rounds: int = 1
    quantize: Callable[[Array], Array] = quantize_nf4

    passes_nan_on: ClassVar[bool] = True


class LoftQ(QuantizedInitializer):
    """See `loftq`."""

    name = "loftq"

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del data
        rounds_key, last_key = jax.random.split(key)
        exact = to_compute(w)
        base = self.quantize(exact)

        if self.num_rounds > 1:
            keys = jax.random.split(rounds_key, self.num_rounds - 1)
            better = _alternate(exact, base, rank, scale, keys, self.quantize).base
            assert better is not None
            base = better

        svd = randomized_svd(exact - base, rank, key=last_key)
        return InitialFactors(base.astype(w.dtype), split_scaled(svd, scale))


class QPiSSA(QuantizedInitializer):
    """See `qpissa`."""

    name = "qpissa"

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        del data
        keys = jax.random.split(key, self.num_rounds)
        return _alternate(w, None, rank, scale, keys, self.quantize)


class QERA(QuantizedInitializer):
    """See `qera`."""

    name = "qera"
    decomposition = "full"
    data_meaning = "second moments of the inputs, [..., m, m]"

    def data_shape(self, m: int, n: int) -> tuple[int | None, ...]:
        return m, m

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        assert data is not None
        exact, root = to_compute(w), take_square_root(data)
        fit = functools.partial(fit_outputs, root=root, rank=rank, scale=scale)
        rounds_key, last_key = jax.random.split(key)

        def run_round(base: Array, key: PRNGKey) -> tuple[Array, None]:
            factors = fit(exact - base, key=key)
            residual = reconstruct(factors, exact, scale=-scale)
            return self.quantize(residual).astype(exact.dtype), None

        if self.num_rounds == 1:
            base = self.quantize(exact)
        else:
            # A scan: one compiled round, however many run.
            keys = jax.random.split(rounds_key, self.num_rounds - 1)
            base, _ = jax.lax.scan(run_round, jnp.zeros_like(exact), keys)
        factors = fit(exact - base, key=last_key)
        return InitialFactors(base.astype(w.dtype), factors)


def _alternate(
    w: Float[Array, "*batch m n"],
    base: Float[Array, "*batch m n"] | None,
    rank: int,
    scale: Scalar,
    keys: Array,
    quantize: Callable[[Array], Array],
) -> InitialFactors:
    """Return the initial factors after rounds of decomposing and quantising.

    Each round decomposes w − base, with one of the keys, and quantises the residual. It
    starts from a base of zero if there is none.
    """
    exact = to_compute(w)
    results = []
    for key in keys:
        remainder = exact if base is None else exact - base
        factors = split_scaled(randomized_svd(remainder, rank, key=key), scale)
        base = quantize(reconstruct(factors, exact, scale=-scale))
        results.append(InitialFactors(base.astype(w.dtype), factors))
    return results[-1]
