"""Rows of one batch through different adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _checks
from jlora._dispatch import (
    check_usable,
    choose,
    run_first,
)
from jlora._numerics import compute_dtype, matmul_activations, thin_dtype, to_compute
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, Float, Int, Scalar
from jlora.factors import Factors, pad_rank
from jlora.reconstruction.apply import choose_dtypes
from jlora.reconstruction.many_implementations import IMPLEMENTATIONS


def stack_factors(factors: Sequence[Factors]) -> Factors:
    """Return a bank of adapters for `apply_many`: stacked factors of one rank.

    Smaller ranks are padded with zeros.

    Args:
        factors: a sequence of a `Factors` of u [m, rᵢ], v [rᵢ, n].

    Returns:
        `Factors` of u [a, m, r], v [a, r, n] in the common compute dtype, r the largest
        rank; adapter i is entry i.

    Raises:
        TypeError: an entry that is no pair of factors.
        ValueError: no entry, or sizes that differ.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> one = jlora.Factors(jnp.ones((3, 1)), jnp.ones((1, 2)))
        >>> two = jlora.Factors(jnp.ones((3, 4)), jnp.ones((4, 2)))
        >>> jlora.stack_factors([one, two]).u.shape
        (2, 3, 4)
    """
    pairs = _checks.check_pairs(factors)
    rank = max(u.shape[-1] for u, _ in pairs)
    arrays = to_compute(*(array for pair in pairs for array in pair))
    padded = [
        pad_rank(Factors(u, v), rank)
        for u, v in zip(arrays[::2], arrays[1::2], strict=True)
    ]
    return jax.tree.map(lambda *each: jnp.stack(each), *padded)


def apply_many(
    x: Float[AnyArray, "*batch t m"],
    bank: Factors,
    index: Int[AnyArray, "*batch t"],
    base: Float[AnyArray, "m n"] | None = None,
    *,
    scale: Scalar = 1.0,
    implementation: str | None = None,
) -> Float[Array, "*batch t n"]:
    """Return x @ base + scale * (x @ u[index]) @ v[index]: an adapter for each row.

    For few rows the adapter of each is gathered. Many rows are sorted by adapter into
    blocks that share one. Nothing is expanded over all adapters.

    Args:
        x: activations, t rows of m inputs.
        bank: `Factors` of u [a, m, r], v [a, r, n]; see `stack_factors` for mixed
            ranks.
        index: the adapter of each row; -1 for none. Traced ones are not checked; one
            out of range counts as -1.
        base: None: no base.
        scale: number, or [a] one for each adapter, static or traced.
        implementation: static, "gather" or "sort". None: chosen.

    Returns:
        Array in the dtype that `apply_factors` gives.

    Raises:
        TypeError: arrays of the wrong kind.
        ValueError: shapes that do not fit, or an index outside [-1, a).

    Cost: x @ base and 2 t r (m + n) flops. Gathering copies r (m + n) elements for
        each row, sorting for each block of b rows, of which there are t / b + a, b = 16
        to 64.

    Accuracy, Gradients: as `apply_factors`; exact, to x, u, v, base and scale.

    Source: Chen et al., "Punica: multi-tenant LoRA serving", 2023, and Sheng et al.,
        "S-LoRA", 2023, for the problem and its two regimes.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> v = jnp.array([[[1.0, 1.0]], [[5.0, 5.0]]])
        >>> bank = jlora.Factors(jnp.ones((2, 3, 1)), v)
        >>> jlora.apply_many(jnp.ones((3, 3)), bank, jnp.array([1, -1, 0])).tolist()
        [[15.0, 15.0], [0.0, 0.0], [3.0, 3.0]]
    """
    given = _prepare(x, bank, index, base, scale, implementation)
    return _apply_many(*given, implementation)


def choose_many(
    platform: str,
    x: Float[AnyArray, "*batch t m"],
    bank: Factors,
    index: Int[AnyArray, "*batch t"],
    base: Float[AnyArray, "m n"] | None = None,
    *,
    scale: Scalar = 1.0,
    implementation: str | None = None,
) -> str:
    """Return the name of the implementation that `apply_many` would run."""
    given = _prepare(x, bank, index, base, scale, implementation)
    return choose(IMPLEMENTATIONS, implementation, platform, given.list_arrays()).name


class _Arguments(NamedTuple):
    """The arguments of `_apply_many`, checked."""

    x: Float[Array, "*batch t m"]
    u: Float[Array, "a m r"]
    v: Float[Array, "a r n"]
    index: Int[Array, "*batch t"]
    base: Float[Array, "m n"] | None
    scale: Array  # scalar or [a]

    def list_arrays(self) -> tuple[Array, ...]:
        """Return the arrays that decide between the implementations."""
        rows = self.x.reshape(math.prod(self.x.shape[:-1]), self.x.shape[-1])
        return rows, self.u, self.v, self.scale, self.index.reshape(-1)


def _prepare(
    x: AnyArray,
    bank: Factors,
    index: AnyArray,
    base: AnyArray | None,
    scale: Scalar,
    implementation: str | None,
) -> _Arguments:
    x = _check_rows(x)
    u, v = _checks.check_factors(bank, "bank")
    if u.ndim != 3:
        raise ValueError(
            f"`bank` must have u [a, m, r] and v [a, r, n], got {u.shape} and "
            f"{v.shape}. Make one with jlora.stack_factors."
        )

    expected = (u.shape[-2],)
    meaning = "its columns are the rows of bank.u"
    _checks.check_shape(x.shape[-1:], expected, "x", meaning)
    if base is not None:
        base = _checks.check_base(base, (u.shape[-2], v.shape[-1]))
    index = _check_index(index, x.shape[:-1], len(u))
    scale = _check_scale(scale, len(u))

    given = _Arguments(x, u, v, index, base, scale)
    check_usable(IMPLEMENTATIONS, implementation, given.list_arrays())
    return given


def _check_rows(x: AnyArray) -> Array:
    x = _checks.check_array(x, "x")
    if x.ndim < 2:
        raise ValueError(
            f"`x` must have shape [..., t, m], got {x.shape}. Add an axis for one row."
        )
    return x


def _check_scale(scale: Any, num_adapters: int) -> Array:
    if np.ndim(scale) == 0:
        return jnp.asarray(_checks.check_scalar(scale, "scale"))
    if isinstance(scale, (list, tuple)):
        scale = jnp.asarray(scale, float)
    scale = _checks.check_array(scale, "scale")
    if scale.shape != (num_adapters,):
        raise ValueError(
            f"`scale` must be a number or have shape ({num_adapters},), one for each "
            f"adapter, got shape {scale.shape}. Reshape it."
        )
    return scale


def _check_index(index: AnyArray, shape: tuple[int, ...], num_adapters: int) -> Array:
    if not (hasattr(index, "shape") and jnp.issubdtype(index.dtype, jnp.integer)):
        kind = getattr(index, "dtype", type(index).__name__)
        raise TypeError(
            f"`index` must be an array of integers, got {kind}. Wrap it with "
            "jnp.asarray."
        )
    _checks.check_shape(index.shape, shape, "index", "one for each row of x")

    if not isinstance(index, Tracer):
        # Two numbers: an index that is sharded over processes is read on the devices.
        for outside in _find_extremes(index):
            if not -1 <= outside < num_adapters:
                raise ValueError(
                    f"`index` must lie in [-1, {num_adapters}), got {outside}. "
                    "Count the adapters of the bank."
                )
    return jnp.asarray(index)


def _find_extremes(index: AnyArray) -> tuple[int, ...]:
    """Return the smallest and the largest entry, or nothing if there is none."""
    if not index.size:
        return ()
    if not (isinstance(index, jax.Array) and not index.is_fully_addressable):
        index = np.asarray(index)  # also inside a trace, where JAX would trace it
    return int(index.min()), int(index.max())


@jax.jit(static_argnames="implementation")
@follow_axes("*x m", "a m r", "a r n", "*x", "m n", None, result="*x n")
def _apply_many(
    x: Array,
    u: Array,
    v: Array,
    index: Array,
    base: Array | None,
    scale: Array,
    implementation: str | None,
) -> Array:
    *batch, m = x.shape
    working, dtype = choose_dtypes(x, u, v, base)
    rows = x.reshape(math.prod(batch), m).astype(working)
    index = index.reshape(-1).astype(jnp.int32)
    scale = jnp.broadcast_to(scale, len(u)).astype(compute_dtype(working))

    v_working = v.astype(thin_dtype(working))
    arrays = rows, u.astype(working), v_working, scale, index
    delta = run_first(IMPLEMENTATIONS, implementation, arrays)
    if base is not None:
        delta = delta + matmul_activations(rows, base.astype(working))
    return delta.astype(dtype).reshape(*batch, v.shape[-1])
