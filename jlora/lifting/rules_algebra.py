"""Rules that scale a weight, by a number or row by row, and that add to it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import ArrayLike

from jlora._types import AnyArray, Array, Float
from jlora.layouts import sort_axes
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    materialize,
    read_base,
    replace,
)


@quax.register(lax.neg_p)
def negate(w: LiftedWeight) -> LiftedWeight:
    base = None if w.base is None else -read_base(w)
    return replace(w, base=base, u=-w.u)


@quax.register(lax.mul_p)
def scale(w: LiftedWeight, factor: ArrayLike, **params: Any) -> LiftedWeight | Array:
    return _scale_factor(lax.mul_p, w, factor, params, jnp.multiply)


@quax.register(lax.mul_p)
def scale_reversed(
    factor: ArrayLike, w: LiftedWeight, **params: Any
) -> LiftedWeight | Array:
    return scale(w, factor, **params)


@quax.register(lax.div_p)
def divide(w: LiftedWeight, divisor: ArrayLike, **params: Any) -> LiftedWeight | Array:
    return _scale_factor(lax.div_p, w, divisor, params, jnp.divide)


@quax.register(lax.add_p)
def add(w: LiftedWeight, other: ArrayLike, **params: Any) -> LiftedWeight | Array:
    del params
    return _add(w, jnp.asarray(other))


@quax.register(lax.add_p)
def add_reversed(
    other: ArrayLike, w: LiftedWeight, **params: Any
) -> LiftedWeight | Array:
    return add(w, other, **params)


@quax.register(lax.sub_p)
def subtract(w: LiftedWeight, other: ArrayLike, **params: Any) -> LiftedWeight | Array:
    return add(w, -jnp.asarray(other), **params)


@quax.register(lax.sub_p)
def subtract_from(
    other: ArrayLike, w: LiftedWeight, **params: Any
) -> LiftedWeight | Array:
    return add(negate(w), other, **params)


def _scale_factor(
    primitive: Primitive,
    w: LiftedWeight,
    numbers: ArrayLike,
    params: dict[str, Any],
    operate: Callable[[AnyArray, Array], Array],
) -> LiftedWeight | Array:
    """Return a weight times (or over) numbers: one, or one for each row or column."""
    numbers = jnp.asarray(numbers)
    numbers = numbers.reshape(numbers.shape or (1,) * len(w.layout))
    factor = _find_factor(w, numbers.shape)
    if factor is None:
        return LiftedWeight.default(primitive, (w, numbers), params)

    # Give the numbers the axes of the factor: [*batch, *inputs, 1 for the rank] for u,
    # [*batch, 1 for the rank, *outputs] for v.
    num_batch, num_inputs = w.layout.count("b"), w.layout.count("i")
    sorted_numbers = numbers.transpose(sort_axes(w.layout))
    sizes = sorted_numbers.shape
    if factor == "u":
        shape = (*sizes[: num_batch + num_inputs], 1)
    else:
        shape = (*sizes[:num_batch], 1, *sizes[num_batch + num_inputs :])
    array = getattr(w, factor)
    thin = sorted_numbers.reshape(shape).astype(array.dtype)

    base = None
    if w.base is not None:
        base = operate(read_base(w), numbers.astype(w.base.dtype))
    return replace(w, base=base, **{factor: operate(array, thin)})


def _find_factor(w: LiftedWeight, sizes: Sequence[int]) -> str | None:
    """Return the factor whose axes numbers of these sizes lie along, None: neither."""
    letters = set()
    for letter, size, full in zip(w.layout, sizes, find_shape(w), strict=True):
        if size not in (1, full):
            return None
        letters |= {letter} if size != 1 else set()

    if {"i", "o"} <= letters:
        return None
    return "v" if "o" in letters else "u"


def _add(w: LiftedWeight, other: Float[Array, "..."]) -> LiftedWeight | Array:
    """Return the sum of a weight and an array.

    The sum is as large as the weight in the plain program too, so it may become an
    array, as a table of positions does. If the program only multiplies by the sum, the
    factors stay thin.
    """
    w = replace(w, can_materialize=True)
    shape = find_shape(w)
    if jnp.broadcast_shapes(shape, other.shape) != shape:
        return materialize(w, "`add`") + other
    base = jnp.zeros((), w.dtype_seen) if w.base is None else read_base(w)
    return replace(w, base=jnp.broadcast_to(base + other.astype(base.dtype), shape))
