"""Products of the matrix with thin panels: fast orientations, 16-bit matrices, no copy.

A panel is stored as rows. A 16-bit matrix is not widened: the panel is split into three parts of
its dtype that together hold 24 bits, laid side by side, so that one product reads the matrix once
and the sum of its three blocks is as exact as a float32 product. That is what tensor cores are
made for; a CPU has no such product, and there `solve_stored` widens the matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, matmul, to_compute

_NUM_PARTS = 3


class ImplicitProduct(NamedTuple):
    """The matrix u @ v, multiplied without being formed."""

    u: jax.Array  # [..., m, k]
    v: jax.Array  # [..., k, n]

    @property
    def shape(self):
        return *self.u.shape[:-1], self.v.shape[-1]

    @property
    def dtype(self):
        return self.u.dtype


def multiply(a, rows):
    """Return (a @ rowsᵀ)ᵀ, [..., l, m] for rows [..., l, n]."""
    if isinstance(a, ImplicitProduct):
        return matmul(matmul(rows, a.v.mT), a.u.mT)
    if a.dtype != rows.dtype:
        return _join_parts(
            _multiply_parts(a, _split_parts(rows, a.dtype).mT).mT, rows.dtype
        )
    # Without the barrier the compiler turns the small transpose that follows into a product in
    # the other orientation, which takes three to five times as long on a CPU.
    return jax.lax.optimization_barrier(matmul(a, rows.mT)).mT


def multiply_transposed(a, rows):
    """Return rows @ a, [..., l, n] for rows [..., l, m]."""
    if isinstance(a, ImplicitProduct):
        return matmul(matmul(rows, a.u), a.v)
    if a.dtype != rows.dtype:
        return _join_parts(_multiply_parts(_split_parts(rows, a.dtype), a), rows.dtype)
    return matmul(rows, a)


def solve_stored(function, a, *arguments):
    """Return function(a, *arguments), where `function` multiplies `a` as it is stored.

    A CPU has no products of 16-bit matrices: there, and only there, one is widened first.
    """
    if a.dtype == compute_dtype(a.dtype):
        return function(a, *arguments)
    return jax.lax.platform_dependent(
        a,
        *arguments,
        cpu=lambda a, *arguments: function(to_compute(a), *arguments),
        default=function,
    )


def _multiply_parts(x, y):
    # Products of 16-bit numbers are exact in float32; DEFAULT asks for nothing more.
    return jnp.matmul(
        x, y, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


def _split_parts(rows, dtype):
    """Return [..., 3 l, n] of a 16-bit dtype whose three blocks sum to 2¹⁰ rows."""
    # Entries of unit rows are small: scaled up, the last part keeps its bits in float16 too.
    left, parts = rows * 1024, []
    for _ in range(_NUM_PARTS):
        part = left.astype(dtype)
        left = left - part.astype(rows.dtype)
        parts.append(part)
    return jnp.concatenate(parts, axis=-2)


def _join_parts(stacked, dtype):
    *batch, num_rows, size = stacked.shape
    parts = stacked.astype(dtype).reshape(
        *batch, _NUM_PARTS, num_rows // _NUM_PARTS, size
    )
    return jnp.sum(parts, axis=-3) / 1024
