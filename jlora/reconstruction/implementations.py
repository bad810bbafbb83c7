"""Implementations of base + u @ v, each best for some platform, rank and donation.

All compute in the dtype of u and v, and round the sum as the `SumSpec` says. The tests
check the compiled programs; benchmarks/results has the times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._dispatch import Implementation, can_always, run_first
from jlora._numerics import matmul
from jlora._types import Array, Float, PRNGKey
from jlora.reconstruction.rounding import CompensatedWeight, round_sum

_BLOCK_ROWS = 256
# A loop over blocks saves nothing for fewer rows.
_LEAST_BLOCKED = 4 * _BLOCK_ROWS

Bases = tuple[Array, ...]  # no base, one, or the two parts of a `CompensatedWeight`
Result = Array | CompensatedWeight


class SumSpec(NamedTuple):
    """The format of a sum; static."""

    dtype: Any
    rounding: str
    donate: bool  # the result may reuse the buffer of the first base
    is_sharded: bool = False  # whether an array is known to lie on several devices

    def round(self, total: Array, key: PRNGKey | None) -> Result:
        return round_sum(total, self.dtype, self.rounding, key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def sum_product(
    bases: Bases,
    u: Float[Array, "*batch m r"],
    v: Float[Array, "*batch r n"],
    key: PRNGKey | None,
    spec: SumSpec,
    implementation: str | None,
) -> Result:
    """Return the sum of the bases and u @ v in the format of `spec`.

    The derivative is the derivative of the exact sum, in plain products: neither an
    implementation nor its rounding is differentiated.
    """
    return run_first(IMPLEMENTATIONS, implementation, (bases, u, v, key), spec)


def _differentiate_sum(
    spec: SumSpec, implementation: str | None, primals: tuple, tangents: tuple
) -> tuple[Result, Result]:
    bases, u, v, key = primals
    base_tangents, u_tangent, v_tangent, _ = tangents
    result = sum_product(bases, u, v, key, spec, implementation)

    # Products of tangents that are known to be zero are not computed.
    parts = [part.astype(u.dtype) for part in base_tangents if not _is_zero(part)]
    if not _is_zero(u_tangent):
        parts.append(matmul(u_tangent, v))
    if not _is_zero(v_tangent):
        parts.append(matmul(u, v_tangent))

    high = sum(parts[1:], parts[0]).astype(spec.dtype)
    if spec.rounding == "compensated":
        return result, CompensatedWeight(high, jnp.zeros_like(high))
    return result, high


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


sum_product.defjvp(_differentiate_sum, symbolic_zeros=True)


def is_gain_unrolled(
    platform: str, bases: Bases, u: Array, v: Array, key: Any, spec: SumSpec
) -> bool:
    if platform == "tpu" or not bases:  # a TPU adds any product in one pass
        return False
    return u.shape[-1] <= _find_most_unrolled(platform, bases[0].dtype)


def _find_most_unrolled(platform: str, dtype: Any) -> int:
    """Return the largest rank at which no other implementation is faster."""
    if platform != "cpu":
        return 16
    # The other implementations convert the whole of a 16-bit base.
    return 24 if dtype.itemsize == 2 else 8


def sum_unrolled(
    bases: Bases, u: Array, v: Array, key: PRNGKey | None, spec: SumSpec
) -> Result:
    """Return the sum rank by rank: elementwise, so that it is one pass over the base.

    The base is added last, or each term would be rounded to the base's last digit.
    """
    shape = (*u.shape[:-1], v.shape[-1])
    terms = []
    for k in range(u.shape[-1]):
        column = jnp.broadcast_to(u[..., :, k, None], shape)
        row = jnp.broadcast_to(v[..., k, None, :], shape)
        terms.append(column * row)

    delta = sum(terms[1:], terms[0])
    return spec.round(add_bases(bases, u.dtype) + delta if bases else delta, key)


def why_not_in_place(
    bases: Bases, u: Array, v: Array, key: Any, spec: SumSpec
) -> str | None:
    """Return why the result cannot reuse one base's buffer, or None if it can."""
    if len(bases) != 1 or spec.rounding != "nearest" or spec.dtype != bases[0].dtype:
        return "needs exactly one base, rounding='nearest' and a result in its dtype"
    return None


def is_gain_blocked(
    platform: str, bases: Bases, u: Array, v: Array, key: Any, spec: SumSpec
) -> bool:
    return platform == "cpu" and spec.donate and u.shape[-2] >= _LEAST_BLOCKED


def sum_blocked(
    bases: Bases, u: Array, v: Array, key: PRNGKey | None, spec: SumSpec
) -> Array:
    """Return the sum by blocks of rows, in the base's buffer.

    Only one block of the product exists at a time.
    """
    (base,) = bases
    dtype = base.dtype
    u, v = _join_batch(u), _join_batch(v)

    def add_rows(bits: Array, layer: Array, first: Array | int, num_rows: int) -> Array:
        offsets = (layer, first, 0)
        old = jax.lax.dynamic_slice(bits, offsets, (1, num_rows, v.shape[-1]))
        thin = jax.lax.dynamic_slice(u, offsets, (1, num_rows, u.shape[-1]))
        delta = matmul(thin, jax.lax.dynamic_slice_in_dim(v, layer, 1))

        total = _from_bits(old, dtype).astype(u.dtype) + delta
        new = _to_bits(spec.round(total, key=None))
        return jax.lax.dynamic_update_slice(bits, new, offsets)

    return _from_bits(_loop_over_rows(_to_bits(base), add_rows), dtype)


def _to_bits(array: Any) -> Array:
    """Return a 16-bit array as integers, any other array unchanged.

    The compiler for CPUs widens the whole of a bfloat16 array for each update of a
    slice.
    """
    is_short = array.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if is_short else array


def _from_bits(bits: Array, dtype: Any) -> Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def _join_batch(array: Array) -> Array:
    """Return [..., m, n] of any dtype as [layers, m, n], also without a matrix."""
    *batch, m, n = array.shape
    return array.reshape(math.prod(batch), m, n)


def _loop_over_rows(array: Array, update: Callable[..., Array]) -> Array:
    """Return array = update(array, layer, first, num_rows) for each block of rows.

    The update sees the batch axes as one: [layers, m, n].
    """
    *batch, m, n = array.shape
    if array.size == 0:
        return array
    array = _join_batch(array)
    num_blocks, num_rest = divmod(m, _BLOCK_ROWS)

    def update_block(i: Array, array: Array) -> Array:
        first = i % num_blocks * _BLOCK_ROWS
        return update(array, i // num_blocks, first, _BLOCK_ROWS)

    def update_rest(i: Array, array: Array) -> Array:
        return update(array, i, m - num_rest, num_rest)

    if num_blocks:
        array = jax.lax.fori_loop(0, len(array) * num_blocks, update_block, array)
    if num_rest:
        array = jax.lax.fori_loop(0, len(array), update_rest, array)
    return array.reshape(*batch, m, n)


def put_columns(
    array: Float[Array, "*batch m n"], block: Float[Array, "*batch m k"], start: int
) -> Float[Array, "*batch m n"]:
    """Return the array with its columns from `start` on replaced by a block."""
    update = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=-1
    )
    return jax.lax.platform_dependent(
        array,
        block,
        cpu=functools.partial(_put_by_rows, start=start),
        default=update,
    )


def _put_by_rows(array: Array, block: Array, start: int) -> Array:
    # One slice would be fused with the computation of the block, over the whole array.
    if array.dtype.itemsize == 2 or array.shape[-2] < _LEAST_BLOCKED:
        return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=-1)
    block = _join_batch(block)

    def put_rows(
        array: Array, layer: Array, first: Array | int, num_rows: int
    ) -> Array:
        sizes = (1, num_rows, block.shape[-1])
        part = jax.lax.dynamic_slice(block, (layer, first, 0), sizes)
        return jax.lax.dynamic_update_slice(array, part, (layer, first, start))

    return _loop_over_rows(array, put_rows)


def is_gain_cast(
    platform: str, bases: Bases, u: Array, v: Array, key: Any, spec: SumSpec
) -> bool:
    return platform == "cuda"


def sum_cast(
    bases: Bases, u: Array, v: Array, key: PRNGKey | None, spec: SumSpec
) -> Array:
    """Return the sum with the product rounded to the base's dtype first.

    Otherwise CUDA's compiler does not add the base in the epilogue of the product: this
    is one kernel in place instead of three, and no product in memory. The product's own
    rounding, 2⁻⁹ of it in bfloat16, comes on top of the rounding of the sum.
    """
    (base,) = bases
    return base + matmul(u, v).astype(base.dtype)


def is_gain_plain(platform: str, *arguments: Any) -> bool:
    return True


def sum_plain(
    bases: Bases, u: Array, v: Array, key: PRNGKey | None, spec: SumSpec
) -> Result:
    """Return the sum as a product and an addition."""
    delta = matmul(u, v)
    return spec.round(add_bases(bases, u.dtype) + delta if bases else delta, key)


def add_bases(bases: Bases, dtype: Any) -> Array:
    """Return the sum of the bases in a dtype."""
    first, *others = (base.astype(dtype) for base in bases)
    return sum(others, first)


IMPLEMENTATIONS = (
    Implementation("cast", why_not_in_place, is_gain_cast, sum_cast),
    Implementation("unrolled", can_always, is_gain_unrolled, sum_unrolled),
    Implementation("blocked", why_not_in_place, is_gain_blocked, sum_blocked),
    Implementation("plain", can_always, is_gain_plain, sum_plain),
)
