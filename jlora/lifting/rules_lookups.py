"""The rule for lookups: rows of a table, or matrices of a stack."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike, Integer

from jlora._types import AnyArray, Array, Float
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    locate_axis,
    materialize,
    read_base,
    replace,
    to_array_if_vector,
)
from jlora.lifting.quantized_axes import look_up_base
from jlora.lifting.reshaping import reshape_weight
from jlora.lifting.rules_layout import transpose
from jlora.quantization.quantized_array import QuantizedArray

_FILL = lax.GatherScatterMode.FILL_OR_DROP


@quax.register(lax.gather_p)
def look_up(w: LiftedWeight, indices: ArrayLike, **params: Any) -> LiftedWeight | Array:
    shape = find_shape(w)
    indices, axis = _find_lookup_axis(shape, jnp.asarray(indices), params)
    if axis is None:
        return LiftedWeight.default(lax.gather_p, (w, indices), params)

    # Gather along the axis in the base and in each factor that has it.
    axes = locate_axis(w.layout, axis)
    arrays = {"u": w.u, "v": w.v}
    gathered: dict[str, Any] = {
        name: _gather(arrays[name], axes[name], indices, params, is_factor=True)
        for name in arrays
        if name in axes
    }
    base = _gather_from_base(w, axis, indices, params)
    if base is not None:
        gathered["base"] = base

    # The axes of the indices take the place of the axis, and come first.
    num_new = indices.ndim - 1
    layout = w.layout[axis] * num_new + w.layout[:axis] + w.layout[axis + 1 :]
    gathered = _move_new_axes(w.layout, axis, num_new, gathered)
    result = replace(w, layout=layout, **gathered)

    # Give the result the axes that the program expects.
    numbers = params["dimension_numbers"]
    if axis not in numbers.collapsed_slice_dims:
        result = _insert_unit_axis(result, num_new + axis)
    order = _order_axes(num_new, len(result.layout), numbers.offset_dims)
    result = transpose(result, permutation=order)

    # A matrix of a stack is still a weight; a row of a table is an activation.
    if w.layout[axis] == "b":
        return to_array_if_vector(result)
    return materialize(replace(result, can_materialize=True), "`gather`")


def _find_lookup_axis(
    shape: Sequence[int], indices: Integer[Array, "..."], params: dict[str, Any]
) -> tuple[Integer[Array, "..."], int | None]:
    """Return (indices [..., 1], axis) of a lookup of single entries along one axis.

    For any other gather the axis is None.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    partial = [axis for axis, size in enumerate(shape) if sizes[axis] != size]
    indexed = numbers.start_index_map
    axis = partial[0] if partial else indexed[0]

    # A slice of the full size of an axis must start at 0, except in fill mode.
    others_start_at_zero = len(indexed) == 1 or params["mode"] != _FILL
    is_lookup = (
        len(partial) <= 1
        and sizes[axis] == 1
        and axis in indexed
        and others_start_at_zero
        and set(numbers.collapsed_slice_dims) <= {axis}
        and not numbers.operand_batching_dims
    )
    if not is_lookup:
        return indices, None

    position = indexed.index(axis)
    return indices[..., position : position + 1], axis


def _gather(
    array: Float[AnyArray, "..."],
    axis: int,
    indices: Integer[Array, "..."],
    params: dict[str, Any],
    is_factor: bool,
) -> Float[Array, "..."]:
    """Return the array looked up along an axis, with the axes of the indices first."""
    num_new, num_kept = indices.ndim - 1, array.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(num_new, num_new + num_kept)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = list(array.shape)
    sizes[axis] = 1

    changed = {"dimension_numbers": numbers, "slice_sizes": tuple(sizes)}
    if is_factor:  # only the base adds the fill value
        changed["fill_value"] = 0
    return lax.gather_p.bind(array, indices, **params | changed)


def _gather_from_base(
    w: LiftedWeight, axis: int, indices: Integer[Array, "..."], params: dict[str, Any]
) -> Float[Array, "..."] | QuantizedArray | None:
    """Return the lookup in the base, None if there is no base and nothing to fill."""
    if w.base is None:
        if params["mode"] != _FILL:
            return None
        return _gather_from_zeros(find_shape(w), axis, indices, params)
    if isinstance(w.base, QuantizedArray):
        fill_value = None
        if params["mode"] == _FILL:
            given = params["fill_value"]
            fill_value = jnp.nan if given is None else given
        found = look_up_base(w.base, w.layout, axis, indices[..., 0], fill_value)
        if found is not None:
            return found
    return _gather(read_base(w), axis, indices, params, is_factor=False)


def _gather_from_zeros(
    shape: Sequence[int],
    axis: int,
    indices: Integer[Array, "..."],
    params: dict[str, Any],
) -> Float[Array, "..."]:
    """Return a lookup in zeros: zeros, or the fill value for indices out of range."""
    # Look up in one vector of zeros, and broadcast the result over the other axes.
    thin_shape = [1] * len(shape)
    thin_shape[axis] = shape[axis]
    zeros = jnp.zeros(thin_shape, jnp.float32)
    thin = _gather(zeros, axis, indices, params, is_factor=False)

    new_sizes = thin.shape[: indices.ndim - 1]
    return jnp.broadcast_to(thin, (*new_sizes, *shape[:axis], *shape[axis + 1 :]))


def _move_new_axes(
    layout: str, axis: int, num_new: int, gathered: dict[str, Any]
) -> dict[str, Any]:
    """Return the arrays with their first axes, the new ones, moved to their kind."""
    # u is [*batch, *inputs, rank], and v is [*batch, rank, *outputs].
    letter, num_batch = layout[axis], layout.count("b")
    first_axes = {
        "base": 0,
        "u": num_batch if letter == "i" else 0,
        "v": num_batch + 1 if letter == "o" else 0,
    }

    moved = {}
    for name, array in gathered.items():
        if isinstance(array, QuantizedArray):  # its new axes are in place
            moved[name] = array
            continue
        first = first_axes[name]
        destination = range(first, first + num_new)
        moved[name] = jnp.moveaxis(array, range(num_new), destination)
    return moved


def _insert_unit_axis(w: LiftedWeight, axis: int) -> LiftedWeight:
    shape = find_shape(w)
    reshaped = reshape_weight(w, (*shape[:axis], 1, *shape[axis:]))
    assert reshaped is not None  # an axis of size one joins nothing
    return reshaped


def _order_axes(num_new: int, ndim: int, offset_dims: Sequence[int]) -> tuple[int, ...]:
    """Return the permutation that moves the axes of the array to `offset_dims`."""
    kept, new = iter(range(num_new, ndim)), iter(range(num_new))
    return tuple(
        next(kept) if axis in offset_dims else next(new) for axis in range(ndim)
    )
