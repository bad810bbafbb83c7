"""The SVD of a product of thin factors, in a scale at which nothing overflows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import (
    is_finite,
    matmul,
    split_scale,
    times_power_of_two,
    to_compute,
)
from jlora._sharding import follow_axes
from jlora._types import Array, Float, Int
from jlora.factorization.core import decompose_core
from jlora.factorization.derivative import differentiate_product
from jlora.factorization.orthonormal import factor_rows
from jlora.factorization.sketch import fixed_sketch
from jlora.factors import (
    NEW_SVD_AXES,
    SVD,
    Factors,
    fix_signs,
    mask_nonfinite,
    split_svd,
    truncate_svd,
)


class ScaledProduct(NamedTuple):
    """u @ v = (unit u) diag(2**exponents) (unit v) * 2**exponent.

    Each column of the unit u and each row of the unit v has a largest entry in [½, 1),
    and the largest of the exponents is zero. So a column of 1e20 beside a row of 1e-20
    neither overflows nor loses its product.
    """

    u: Float[Array, "*batch m k"]
    v: Float[Array, "*batch k n"]
    exponents: Int[Array, "*batch k 1"]  # not positive
    exponent: Int[Array, "*batch 1 1"]


class ScaledSVD(NamedTuple):
    """The SVD of a matrix times 2**-exponent, with singular values near one."""

    svd: SVD
    exponent: Int[Array, "*batch 1 1"]


_SCALED_AXES: Any = ScaledSVD(NEW_SVD_AXES, "*b _ _")  # type: ignore[arg-type]


def decompose_product(
    u: Float[Array, "*batch m k"], v: Float[Array, "*batch k n"], rank: int
) -> SVD:
    """Return the SVD of u @ v truncated to `rank`."""
    svd, exponent = decompose_scaled(u, v, rank)
    return svd._replace(s=times_power_of_two(svd.s, exponent[..., 0]))


def balance_product(
    u: Float[Array, "*batch m k"], v: Float[Array, "*batch k n"], rank: int
) -> Factors:
    """Return balanced factors of u @ v truncated to `rank`.

    The singular values may leave the range of the dtype where their roots do not.
    """
    svd, exponent = decompose_scaled(u, v, rank)
    # √(s 2**e) = √(s 2**(e mod 2)) 2**(e // 2)
    is_odd, half = exponent % 2, exponent // 2
    svd = svd._replace(s=times_power_of_two(svd.s, is_odd[..., 0]))
    return Factors(*(times_power_of_two(factor, half) for factor in split_svd(svd)))


@functools.partial(jax.jit, static_argnames="rank")
@follow_axes("*b m k", "*b k n", result=_SCALED_AXES)
def decompose_scaled(
    u: Float[Array, "*batch m k"], v: Float[Array, "*batch k n"], rank: int
) -> ScaledSVD:
    product = equilibrate(*to_compute(u, v))
    weighted = times_power_of_two(product.v, product.exponents)
    return ScaledSVD(_decompose_pair(product.u, weighted, rank), product.exponent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _decompose_pair(
    u: Float[Array, "*batch m k"], v: Float[Array, "*batch k n"], rank: int
) -> SVD:
    """Return the SVD of u @ v, whose largest terms are near one."""
    # Orthonormalise both factors.
    left, part_u = factor_rows(u.mT)
    right, part_v = factor_rows(v)

    # Decompose the small matrix between the bases, and rotate them.
    core = matmul(part_u.mT, part_v)
    noise = fixed_sketch(rank, core.shape[-1], core.dtype)
    e, s, f = decompose_core(core, rank, noise, is_reduced=False)
    svd = SVD(
        e if left is None else matmul(e.mT, left).mT,
        s,
        f if right is None else matmul(f, right),
    )
    return mask_nonfinite(fix_signs(svd), is_finite(core))


@_decompose_pair.defjvp
def _differentiate_pair(
    rank: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[SVD, SVD]:
    u, v = primals
    svd = _decompose_pair(u, v, find_rank_limit(u, v))
    tangent = differentiate_product(svd, rank, u, v, *tangents)
    return truncate_svd(svd, rank), tangent


def equilibrate(
    u: Float[Array, "*batch m k"], v: Float[Array, "*batch k n"]
) -> ScaledProduct:
    """Return u @ v as `ScaledProduct`: each column and row in a scale of its own."""
    unit_u, exponent_u = split_scale(u, axis=-2)
    unit_v, exponent_v = split_scale(v, axis=-1)
    exponents = exponent_u.mT + exponent_v
    exponent = jnp.max(exponents, axis=-2, keepdims=True)
    return ScaledProduct(unit_u, unit_v, exponents - exponent, exponent)


def find_rank_limit(u: Array, v: Array) -> int:
    """Return the largest rank of u @ v."""
    return min(u.shape[-2], v.shape[-1], u.shape[-1])
