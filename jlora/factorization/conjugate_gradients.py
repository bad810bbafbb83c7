"""Preconditioned conjugate gradients, one independent problem per column."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import split_scale, times_power_of_two
from jlora._sharding import vary_as
from jlora._types import Array, Bool, Float, Int

# Conjugate gradients stop at a relative residual near rounding, or after this many
# steps, and then give NaN.
_MAX_STEPS = 300
_RESIDUAL_OF_SOLVE = 8  # in eps


class _State(NamedTuple):
    """Preconditioned conjugate gradients, one independent problem per column."""

    num_steps: int | Int[Array, ""]
    x: Float[Array, "*batch m r"]
    residual: Float[Array, "*batch m r"]
    direction: Float[Array, "*batch m r"]
    product: Float[Array, "*batch 1 r"]  # residual · preconditioned residual
    is_open: Bool[Array, "*batch 1 r"]  # whether the residual is above rounding


def solve_positive(
    operator: Callable[[Float[Array, "*batch m r"]], Float[Array, "*batch m r"]],
    precondition: Callable[[Float[Array, "*batch m r"]], Float[Array, "*batch m r"]],
    right_side: Float[Array, "*batch m r"],
) -> Float[Array, "*batch m r"]:
    """Return the solution of operator(x) = right_side, by conjugate gradients.

    The columns are independent problems. Each has its own step lengths, and stops when
    its residual is at the rounding level of its right-hand side. A column that does not
    get there is NaN.
    """
    # A tiny or huge right-hand side has squares that leave the range of the dtype.
    residual, exponent = split_scale(right_side, axis=-2)
    eps = jnp.finfo(residual.dtype).eps
    threshold = (_RESIDUAL_OF_SOLVE * eps) ** 2 * _dot_columns(residual, residual)

    def is_open(state: _State) -> Bool[Array, ""]:
        return (state.num_steps < _MAX_STEPS) & jnp.any(state.is_open)

    def iterate(state: _State) -> _State:
        num_steps, x, residual, direction, product, is_open = state

        # A finished column gets steps of length zero.
        image = operator(direction)
        curvature = _dot_columns(direction, image)
        is_usable = is_open & (curvature > 0)
        length = _divide_where(is_usable, product, curvature)
        x, residual = x + length * direction, residual - length * image

        preconditioned = precondition(residual)
        new_product = _dot_columns(residual, preconditioned)
        ratio = _divide_where(is_usable, new_product, product)
        is_open = is_open & (_dot_columns(residual, residual) > threshold)
        direction = preconditioned + ratio * direction
        return _State(
            num_steps + 1, x, residual, direction, new_product, is_open & is_usable
        )

    direction = precondition(residual)
    product = _dot_columns(residual, direction)
    zeros, is_nonzero = jnp.zeros_like(residual), threshold > 0
    state = _State(0, zeros, residual, direction, product, is_nonzero)
    state = vary_as(state, residual)._replace(num_steps=0)
    state = jax.lax.while_loop(is_open, iterate, state)

    square = _dot_columns(state.residual, state.residual)
    is_solved = square <= 4 * threshold
    return times_power_of_two(jnp.where(is_solved, state.x, jnp.nan), exponent)


def _divide_where(
    condition: Bool[Array, ...], numerator: Array, denominator: Array
) -> Array:
    """Return numerator / denominator where the condition holds, and else 0."""
    safe = jnp.where(condition, denominator, jnp.ones_like(denominator))
    return jnp.where(condition, numerator / safe, jnp.zeros_like(numerator))


def _dot_columns(
    x: Float[Array, "*batch m r"], y: Float[Array, "*batch m r"]
) -> Float[Array, "*batch 1 r"]:
    return jnp.sum(x * y, axis=-2, keepdims=True)
