"""Slices and lookups along one axis of a quantised base, which stays quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._types import AnyArray, Array, Bool, Int
from jlora.layouts import list_axes, restore_layout
from jlora.quantization.lookups import take_inputs
from jlora.quantization.quantized_array import QuantizedArray


def map_base_axis(
    base: QuantizedArray,
    layout: str,
    axis: int,
    fn: Callable[[AnyArray, int], AnyArray],
) -> QuantizedArray | None:
    """Return the base with fn(array, axis) in place of each array with an axis.

    None: the axis is of inputs, whose codes share bytes and scales, or one of several
    axes of outputs.
    """
    letter = layout[axis]
    if letter == "i" or (letter == "o" and layout.count("o") > 1):
        return None
    from jlora.quantization.scales import read_scales  # on use, as the formats

    if letter == "b":
        place = list_axes(layout, "b").index(axis)
    else:
        place = base.codes.ndim - 2
        # Nested scales are shared by several outputs.
        base = dataclasses.replace(base, scales=read_scales(base.scales))

    mapped = jax.tree.map(lambda leaf: fn(leaf, place), base)
    shape = list(base.shape)
    shape[axis] = mapped.codes.shape[place]
    return mapped.view(layout, shape)


def squeeze_base(
    base: QuantizedArray, layout: str, axes: Sequence[int]
) -> QuantizedArray:
    """Return the base without some axes of size one."""
    batch = list_axes(layout, "b")
    places = [batch.index(axis) for axis in axes if axis in batch]
    squeezed = jax.tree.map(lambda leaf: lax.squeeze(leaf, places), base)

    kept = [axis for axis in range(len(layout)) if axis not in axes]
    shape = [base.shape[axis] for axis in kept]
    return squeezed.view("".join(layout[axis] for axis in kept), shape)


def look_up_base(
    base: QuantizedArray,
    layout: str,
    axis: int,
    indices: Int[Array, ...],
    fill_value: Any,
) -> QuantizedArray | Array | None:
    """Return the entries of a base along an axis, the axes of the indices in front.

    Only the entries that are asked for are dequantised. A stack of matrices stays
    quantised.

    Args:
        base: the base.
        layout: a letter for each of its axes.
        axis: the axis.
        indices: entries of the axis.
        fill_value: of entries out of range. None: the nearest entry in range.

    Returns:
        Array [*indices, *other axes], or a `QuantizedArray` for a batch axis. None: the
        axis is one of several of its kind, or a stack is to be filled with numbers.
    """
    letter, size = layout[axis], base.shape[axis]
    is_outside = (indices < 0) | (indices >= size)
    if letter == "b":
        return _look_up_matrices(base, layout, axis, indices, is_outside, fill_value)
    if layout.count(letter) > 1:
        return None

    flat = indices.reshape(-1)
    if letter == "i":
        matrices = take_inputs(base, flat).mT
    else:
        taken = map_base_axis(base, layout, axis, _make_take(flat))
        assert taken is not None
        matrices = _view_matrices(taken)
    shape = list(base.shape)
    shape[axis] = len(flat)
    array = restore_layout(matrices, layout, shape).astype(base.dtype)
    array = jnp.moveaxis(array, axis, 0)

    rest = array.shape[1:]
    array = array.reshape(*indices.shape, *rest)
    if fill_value is None:
        return array
    is_outside = is_outside.reshape(*indices.shape, *(1 for _ in rest))
    return jnp.where(is_outside, jnp.asarray(fill_value, array.dtype), array)


def _look_up_matrices(
    base: QuantizedArray,
    layout: str,
    axis: int,
    indices: Int[Array, ...],
    is_outside: Bool[Array, ...],
    fill_value: Any,
) -> QuantizedArray | None:
    """Return the matrices of a stack; one out of range is NaN by its scales."""
    is_filled = fill_value is not None
    if is_filled and not np.isnan(fill_value):
        return None
    place, num_new = list_axes(layout, "b").index(axis), indices.ndim

    def take(leaf: Array) -> Array:
        taken = jnp.take(leaf, indices, place, mode="clip")
        taken = jnp.moveaxis(taken, range(place, place + num_new), range(num_new))
        if not (is_filled and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return taken
        missing = is_outside.reshape(*indices.shape, *(1,) * (taken.ndim - num_new))
        return jnp.where(missing, jnp.asarray(jnp.nan, taken.dtype), taken)

    shape = list(base.shape)
    del shape[axis]
    taken = jax.tree.map(take, base)
    new_layout = "b" * num_new + layout[:axis] + layout[axis + 1 :]
    return taken.view(new_layout, [*indices.shape, *shape])


def _make_take(indices: Int[Array, " k"]) -> Callable[[AnyArray, int], AnyArray]:
    return lambda array, axis: jnp.take(array, indices, axis, mode="clip")


def _view_matrices(base: QuantizedArray) -> Array:
    """Return the matrices [*batch, m, n] of a base."""
    batch, n = base.codes.shape[:-2], base.num_outputs
    shape = (*batch, base.num_inputs, n)
    return base.view("io", shape).dequantize()
