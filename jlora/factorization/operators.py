"""Products of a matrix with thin panels: fast orientations, 16-bit matrices, no copy.

A panel is stored as rows. A matrix is an array, or an `Operator` that defines its own
products.

A 16-bit matrix is not cast to float32. Instead we split the panel into three parts of
the matrix's dtype that together hold 24 bits, and stack them. One product then reads
the matrix once, and the sum of its three blocks is as exact as a float32 product.
Tensor cores are fast at this. A CPU has no such product, so there `solve_stored` casts
the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype, matmul, to_compute
from jlora._types import Array, DTypeLike, Float

ResultT = TypeVar("ResultT")

_NUM_PARTS = 3
# Entries of unit rows are small. Scaled up, they keep the bits of the last part in
# float16 too.
_PART_SCALE = 1024


@runtime_checkable
class Operator(Protocol):
    """A matrix [..., m, n] that is known only by its products."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, with its batch axes."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the products, at least float32."""
        ...

    def multiply(self, rows: Float[Array, "... l n"]) -> Float[Array, "... l m"]:
        """Return (a @ rowsᵀ)ᵀ."""
        ...

    def multiply_transposed(
        self, rows: Float[Array, "... l m"]
    ) -> Float[Array, "... l n"]:
        """Return rows @ a."""
        ...


Matrix: TypeAlias = Float[Array, "*batch m n"] | Operator


class ImplicitProduct(NamedTuple):
    """The operator u @ v. It multiplies factor by factor and never materialises."""

    u: Float[Array, "*batch m k"]
    v: Float[Array, "*batch k n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of u @ v."""
        return *self.u.shape[:-1], self.v.shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of both factors."""
        return self.u.dtype

    def multiply(self, rows: Float[Array, "... l n"]) -> Float[Array, "... l m"]:
        """Return (u @ v @ rowsᵀ)ᵀ."""
        return matmul(matmul(rows, self.v.mT), self.u.mT)

    def multiply_transposed(
        self, rows: Float[Array, "... l m"]
    ) -> Float[Array, "... l n"]:
        """Return rows @ u @ v."""
        return matmul(matmul(rows, self.u), self.v)


def multiply(a: Matrix, rows: Float[Array, "... l n"]) -> Float[Array, "... l m"]:
    """Return (a @ rowsᵀ)ᵀ in the dtype of `rows`."""
    if isinstance(a, Operator):
        return a.multiply(rows)
    if a.dtype != rows.dtype:
        stacked = _multiply_parts(a, _split_parts(rows, a.dtype).mT).mT
        return _join_parts(stacked, rows.dtype)
    # Without the barrier the compiler merges the small transpose into the product, and
    # the product in the other orientation takes three to five times as long on a CPU.
    return jax.lax.optimization_barrier(matmul(a, rows.mT)).mT


def multiply_transposed(
    a: Matrix, rows: Float[Array, "... l m"]
) -> Float[Array, "... l n"]:
    """Return rows @ a in the dtype of `rows`."""
    if isinstance(a, Operator):
        return a.multiply_transposed(rows)
    if a.dtype != rows.dtype:
        stacked = _multiply_parts(_split_parts(rows, a.dtype), a)
        return _join_parts(stacked, rows.dtype)
    return matmul(rows, a)


def solve_stored(
    function: Callable[..., ResultT], a: Float[Array, "*batch m n"], *arguments: Any
) -> ResultT:
    """Return function(a, *arguments), with `a` in its stored dtype where possible.

    A CPU has no products of 16-bit matrices, so there, and only there, `a` is cast to
    the compute dtype first.
    """
    if a.dtype == compute_dtype(a.dtype):
        return function(a, *arguments)
    return jax.lax.platform_dependent(
        a,
        *arguments,
        cpu=lambda a, *arguments: function(to_compute(a), *arguments),
        default=function,
    )


def _multiply_parts(
    x: Float[Array, "... p q"], y: Float[Array, "... q r"]
) -> Float[Array, "... p r"]:
    """Return x @ y in float32, for operands of one 16-bit dtype."""
    # Products of 16-bit numbers are exact in float32, so DEFAULT precision is enough.
    return jnp.matmul(
        x, y, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32
    )


def _split_parts(
    rows: Float[Array, "*batch l n"], dtype: DTypeLike
) -> Float[Array, "*batch 3*l n"]:
    """Return three stacked blocks of a 16-bit dtype whose sum is 1024 rows."""
    remainder, parts = rows * _PART_SCALE, []
    for _ in range(_NUM_PARTS):
        part = remainder.astype(dtype)
        remainder = remainder - part.astype(rows.dtype)
        parts.append(part)
    return jnp.concatenate(parts, axis=-2)


def _join_parts(
    stacked: Float[Array, "*batch _ k"], dtype: DTypeLike
) -> Float[Array, "*batch _ k"]:
    """Return the sum of three stacked blocks of rows, divided by 1024."""
    *batch, num_rows, size = stacked.shape
    shape = (*batch, _NUM_PARTS, num_rows // _NUM_PARTS, size)
    parts = stacked.astype(dtype).reshape(shape)
    return jnp.sum(parts, axis=-3) / _PART_SCALE
