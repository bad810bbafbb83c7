"""Rules whose result is a weight: casts, transposes, reshapes, slices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import quax
from jax import lax
from jaxtyping import ArrayLike

from jlora._types import AnyArray, Array
from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    locate_axis,
    map_arrays,
    materialize,
    read_base,
    replace,
    to_array_if_vector,
)
from jlora.lifting.quantized_axes import map_base_axis, squeeze_base
from jlora.lifting.reshaping import reshape_weight
from jlora.quantization.quantized_array import QuantizedArray


@quax.register(lax.convert_element_type_p)
def convert_dtype(
    w: LiftedWeight, *, new_dtype: np.dtype, **params: Any
) -> LiftedWeight | Array:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        params = {"new_dtype": new_dtype, **params}
        return LiftedWeight.default(lax.convert_element_type_p, (w,), params)

    # The factors keep their dtype; products cast them.
    base = None if w.base is None else w.base.astype(new_dtype)
    return replace(w, base=base, dtype_seen=jnp.dtype(new_dtype))


@quax.register(lax.transpose_p)
def transpose(w: LiftedWeight, *, permutation: Sequence[int]) -> LiftedWeight:
    # Each factor keeps its kinds of axes in order; permute the axes within each kind.
    batch, inputs, outputs = (
        _permute_within(w.layout, permutation, letter) for letter in "bio"
    )

    # u is [*batch, *inputs, rank], and v is [*batch, rank, *outputs].
    num_batch = len(batch)
    u_order = [*batch, *(num_batch + index for index in inputs), w.u.ndim - 1]
    v_order = [*batch, num_batch, *(num_batch + 1 + index for index in outputs)]

    layout = "".join(w.layout[axis] for axis in permutation)
    is_in_order = all(order == sorted(order) for order in (batch, inputs, outputs))
    if isinstance(w.base, QuantizedArray) and is_in_order:
        base = w.base.view(layout, [w.base.shape[axis] for axis in permutation])
    else:
        base = None if w.base is None else jnp.transpose(read_base(w), permutation)
    return replace(
        w,
        layout=layout,
        u=jnp.transpose(w.u, u_order),
        v=jnp.transpose(w.v, v_order),
        base=base,
    )


def _permute_within(layout: str, permutation: Sequence[int], letter: str) -> list[int]:
    """Return the permutation of the axes of one kind, counted among that kind."""
    axes = list_axes(layout, letter)
    return [axes.index(axis) for axis in permutation if layout[axis] == letter]


@quax.register(lax.reshape_p)
def reshape(
    w: LiftedWeight,
    *,
    new_sizes: Sequence[int],
    dimensions: Sequence[int] | None,
    **params: Any,
) -> LiftedWeight | Array:
    reshaped = None if dimensions is not None else reshape_weight(w, new_sizes)
    if reshaped is None:
        array = materialize(w, "`reshape` of inputs with outputs")
        return lax.reshape(array, new_sizes, dimensions)
    return to_array_if_vector(reshaped)


@quax.register(lax.squeeze_p)
def squeeze(w: LiftedWeight, *, dimensions: Sequence[int]) -> LiftedWeight | Array:
    axes = [axis % len(w.layout) for axis in dimensions]

    # Find the axes to drop in the base and in each factor.
    dropped: dict[str, list[int]] = {"base": axes, "u": [], "v": []}
    for axis in axes:
        for name, factor_axis in locate_axis(w.layout, axis).items():
            dropped[name].append(factor_axis)

    squeezed = map_arrays(
        w,
        lambda name, array: lax.squeeze(array, dropped[name]),
        lambda base: squeeze_base(base, w.layout, axes),
    )
    layout = "".join(letter for axis, letter in enumerate(w.layout) if axis not in axes)
    return to_array_if_vector(replace(squeezed, layout=layout))


@quax.register(lax.broadcast_in_dim_p)
def broadcast(
    w: LiftedWeight,
    *dynamic: ArrayLike,
    shape: Sequence[int],
    broadcast_dimensions: Sequence[int],
    **params: Any,
) -> LiftedWeight | Array:
    old_sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, find_shape(w), strict=True):
        old_sizes[axis] = size

    # Only new axes of size one leave the values where they are.
    reshaped = reshape_weight(w, shape) if old_sizes == list(shape) else None
    if reshaped is None:
        params |= {"shape": shape, "broadcast_dimensions": broadcast_dimensions}
        return LiftedWeight.default(lax.broadcast_in_dim_p, (w, *dynamic), params)
    return reshaped


@quax.register(lax.slice_p)
def slice_static(
    w: LiftedWeight,
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
) -> LiftedWeight:
    strides = strides or [1] * len(start_indices)
    bounds = zip(start_indices, limit_indices, strides, strict=True)
    for axis, (size, bound) in enumerate(zip(find_shape(w), bounds, strict=True)):
        if bound != (0, size, 1):
            w = _slice_axis(w, axis, *bound)
    return w


@quax.register(lax.dynamic_slice_p)
def slice_dynamic(
    w: LiftedWeight, *starts: ArrayLike, slice_sizes: Sequence[int]
) -> LiftedWeight:
    for axis, size in enumerate(find_shape(w)):
        if slice_sizes[axis] != size:
            w = _slice_axis_dynamically(w, axis, starts[axis], slice_sizes[axis])
    return w


@quax.register(lax.split_p)
def split(
    w: LiftedWeight, *, sizes: Sequence[int | np.integer], axis: int
) -> list[LiftedWeight]:
    pieces, start = [], 0
    for size in map(int, sizes):
        pieces.append(_slice_axis(w, axis, start, start + size))
        start += size
    return pieces


def unstack(w: LiftedWeight, *, axis: int) -> list[LiftedWeight | Array]:
    pieces = split(w, sizes=[1] * find_shape(w)[axis], axis=axis)
    return [squeeze(piece, dimensions=[axis]) for piece in pieces]


# In JAX 0.10.0 jnp.unstack is made of slices.
if hasattr(lax, "unstack_p"):
    quax.register(lax.unstack_p)(unstack)


@quax.register(lax.rev_p)
def reverse(w: LiftedWeight, *, dimensions: Sequence[int]) -> LiftedWeight:
    for axis in dimensions:
        w = _map_axis(w, axis, lambda array, array_axis: lax.rev(array, [array_axis]))
    return w


@quax.register(lax.stop_gradient_p)
def stop_gradient(w: LiftedWeight) -> LiftedWeight:
    # A quantised base has no gradient.
    return map_arrays(
        w, lambda name, array: lax.stop_gradient(array), lambda base: base
    )


@quax.register(lax.optimization_barrier_p)
def hold_together(*values: LiftedWeight | ArrayLike) -> list[Any]:
    # One barrier over the arrays of all the weights, as the program asks for.
    return lax.optimization_barrier(list(values))


@quax.register(lax.copy_p)
def copy(w: LiftedWeight) -> LiftedWeight:
    return w


@quax.register(lax.sharding_constraint_p)
def shard_base(w: LiftedWeight, **params: Any) -> LiftedWeight:
    # The constraint is about the large array; the compiler places the thin factors.
    base = None
    if w.base is not None:
        base = lax.sharding_constraint_p.bind(read_base(w), **params)
    return replace(w, base=base)


def _slice_axis(
    w: LiftedWeight, axis: int, start: int, limit: int, stride: int = 1
) -> LiftedWeight:
    def slice_array(array: AnyArray, array_axis: int) -> Array:
        return lax.slice_in_dim(array, start, limit, stride, axis=array_axis)

    return _map_axis(w, axis, slice_array)


def _slice_axis_dynamically(
    w: LiftedWeight, axis: int, start: ArrayLike, size: int
) -> LiftedWeight:
    def slice_array(array: AnyArray, array_axis: int) -> Array:
        return lax.dynamic_slice_in_dim(array, start, size, array_axis)

    return _map_axis(w, axis, slice_array)


def _map_axis(
    w: LiftedWeight, axis: int, fn: Callable[[AnyArray, int], AnyArray]
) -> LiftedWeight:
    """Return the weight with fn(array, axis) in place of each array with the axis."""
    axes = {"base": axis, **locate_axis(w.layout, axis)}

    def map_array(name: str, array: AnyArray) -> AnyArray:
        return fn(array, axes[name]) if name in axes else array

    return map_arrays(
        w, map_array, lambda base: map_base_axis(base, w.layout, axis, fn)
    )
