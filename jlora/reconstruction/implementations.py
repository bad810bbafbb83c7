"""Forms of base + u @ v, each the best for some platform, rank and use of the base's memory.

All compute in the dtype of u and v, and round the sum as the `Spec` says. What each compiles to
is in the tests; what each takes, in benchmarks/results.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._dispatch import Implementation, can_always, run_first
from jlora._numerics import matmul
from jlora.reconstruction.rounding import CompensatedWeight, round_sum

_BLOCK_ROWS = 256
# Beside fewer rows, a loop over blocks saves nothing.
_LEAST_BLOCKED = 4 * _BLOCK_ROWS


class Spec(NamedTuple):
    """What a sum becomes; static."""

    dtype: jnp.dtype
    rounding: str
    donate: bool  # the first base's memory may be taken

    def round(self, total, key):
        return round_sum(total, self.dtype, self.rounding, key)


def is_gain_unrolled(platform, bases, u, v, key, spec):
    if platform == "tpu" or not bases:  # a TPU adds any product in one pass
        return False
    return u.shape[-1] <= _find_most_unrolled(platform, bases[0].dtype)


def _find_most_unrolled(platform, dtype):
    """Return the largest rank at which no other form is faster."""
    if platform != "cpu":
        return 16
    return (
        24 if dtype.itemsize == 2 else 8
    )  # the other forms convert all of a 16-bit base


def sum_unrolled(bases, u, v, key, spec):
    """Return the sum rank by rank: elementwise, so that it is one pass over the base.

    The base comes last: each of the terms would be rounded to its last place.
    """
    shape = (*u.shape[:-1], v.shape[-1])
    terms = [
        jnp.broadcast_to(u[..., :, k, None], shape)
        * jnp.broadcast_to(v[..., k, None, :], shape)
        for k in range(u.shape[-1])
    ]
    delta = sum(terms[1:], terms[0])
    return spec.round(add_bases(bases, u.dtype) + delta if bases else delta, key)


def why_not_in_place(bases, u, v, key, spec):
    if len(bases) != 1 or spec.rounding != "nearest" or spec.dtype != bases[0].dtype:
        return "keeps the dtype of one base, rounded to the nearest"
    return None


def is_gain_blocked(platform, bases, u, v, key, spec):
    return platform == "cpu" and spec.donate and u.shape[-2] >= _LEAST_BLOCKED


def sum_blocked(bases, u, v, key, spec):
    """Return the sum by blocks of rows, in the base's memory: the product is never all there."""
    (base,) = bases
    dtype = base.dtype
    u, v = (part.reshape(-1, *part.shape[-2:]) for part in (u, v))

    def add_rows(bits, layer, start, rows):
        block = _from_bits(
            jax.lax.dynamic_slice(bits, (layer, start, 0), (1, rows, v.shape[-1])),
            dtype,
        )
        thin = jax.lax.dynamic_slice(u, (layer, start, 0), (1, rows, u.shape[-1]))
        total = block.astype(u.dtype) + matmul(
            thin, jax.lax.dynamic_slice_in_dim(v, layer, 1)
        )
        return jax.lax.dynamic_update_slice(
            bits, _to_bits(spec.round(total, key=None)), (layer, start, 0)
        )

    return _from_bits(_loop_over_rows(_to_bits(base), add_rows), dtype)


def _to_bits(array):
    # A CPU's compiler widens all of a bfloat16 array for each slice that is put into it.
    is_short = array.dtype.itemsize == 2
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if is_short else array


def _from_bits(bits, dtype):
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def _loop_over_rows(array, update):
    """Return [..., m, n] after array = update(array, layer, start, rows) for each block of rows.

    The update sees the batch axes as one: [layers, m, n].
    """
    *batch, m, n = array.shape
    array = array.reshape(-1, m, n)
    num_blocks, left_over = divmod(m, _BLOCK_ROWS)

    def update_block(i, array):
        return update(array, i // num_blocks, i % num_blocks * _BLOCK_ROWS, _BLOCK_ROWS)

    if num_blocks:
        array = jax.lax.fori_loop(0, len(array) * num_blocks, update_block, array)
    if left_over:
        array = jax.lax.fori_loop(
            0,
            len(array),
            lambda i, array: update(array, i, m - left_over, left_over),
            array,
        )
    return array.reshape(*batch, m, n)


def put_columns(array, block, start):
    """Return [..., m, n] `array` with its columns from `start` on replaced by those of a block."""
    return jax.lax.platform_dependent(
        array,
        block,
        cpu=functools.partial(_put_by_rows, start=start),
        default=functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=-1
        ),
    )


def _put_by_rows(array, block, start):
    # As one slice it is fused with what makes the block, and the whole array is gone through.
    if array.dtype.itemsize == 2 or array.shape[-2] < _LEAST_BLOCKED:
        return jax.lax.dynamic_update_slice_in_dim(array, block, start, axis=-1)
    block = block.reshape(-1, *block.shape[-2:])

    def put_rows(array, layer, first, rows):
        part = jax.lax.dynamic_slice(
            block, (layer, first, 0), (1, rows, block.shape[-1])
        )
        return jax.lax.dynamic_update_slice(array, part, (layer, first, start))

    return _loop_over_rows(array, put_rows)


def is_gain_cast(platform, bases, u, v, key, spec):
    return platform == "cuda"


def sum_cast(bases, u, v, key, spec):
    """Return the sum with the product rounded to the base's dtype first.

    Only so does CUDA's compiler add the base in the epilogue of the product, in place: one
    kernel rather than three, and no product in memory. The product's own rounding, 2⁻⁹ of it in
    bfloat16, is added to that of the sum.
    """
    (base,) = bases
    return base + matmul(u, v).astype(base.dtype)


def sum_plain(bases, u, v, key, spec):
    """Return the sum as it is written."""
    delta = matmul(u, v)
    return spec.round(add_bases(bases, u.dtype) + delta if bases else delta, key)


def add_bases(bases, dtype):
    first, *others = (base.astype(dtype) for base in bases)
    return sum(others, first)


def is_spread(array):
    """Return whether an array lies on several devices; of a traced one that is not known."""
    if isinstance(array, jax.core.Tracer):
        return False
    return len(array.sharding.device_set) > 1


IMPLEMENTATIONS = (
    Implementation("cast", why_not_in_place, is_gain_cast, sum_cast),
    Implementation("unrolled", can_always, is_gain_unrolled, sum_unrolled),
    Implementation("blocked", why_not_in_place, is_gain_blocked, sum_blocked),
    Implementation("plain", can_always, lambda platform, *arguments: True, sum_plain),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def sum_product(bases, u, v, key, spec, implementation):
    """Return the sum of the bases and u @ v as `spec` says, in the chosen form.

    The derivative is that of the sum, in plain products: no form is differentiated, and none of
    the rounding.
    """
    return run_first(IMPLEMENTATIONS, implementation, (bases, u, v, key), spec)


def _differentiate(spec, implementation, primals, tangents):
    bases, u, v, key = primals
    base_tangents, u_tangent, v_tangent, _ = tangents
    result = sum_product(bases, u, v, key, spec, implementation)
    parts = [part.astype(u.dtype) for part in base_tangents if not _is_zero(part)]
    if not _is_zero(u_tangent):
        parts.append(matmul(u_tangent, v))
    if not _is_zero(v_tangent):
        parts.append(matmul(u, v_tangent))
    high = sum(parts[1:], parts[0]).astype(spec.dtype)
    is_pair = spec.rounding == "compensated"
    return result, CompensatedWeight(high, jnp.zeros_like(high)) if is_pair else high


def _is_zero(tangent):
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


sum_product.defjvp(_differentiate, symbolic_zeros=True)
