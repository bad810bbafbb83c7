"""Rules for what moves an array about: casts, transposes, reshapes, slices, scalar factors."""

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    form,
    locate,
    map_arrays,
    replace,
    reshape_weight,
    settle,
)


@quax.register(lax.convert_element_type_p)
def convert(w: LiftedWeight, *, new_dtype, **params):
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return LiftedWeight.default(
            lax.convert_element_type_p, (w,), {"new_dtype": new_dtype, **params}
        )
    base = None if w.base is None else w.base.astype(new_dtype)
    return replace(w, base=base, dtype_seen=jnp.dtype(new_dtype))


@quax.register(lax.transpose_p)
def transpose(w: LiftedWeight, *, permutation):
    letters = "".join(w.letters[axis] for axis in permutation)
    orders = {
        kind: [axis for axis in permutation if w.letters[axis] == kind]
        for kind in "bio"
    }
    # Where each axis of a kind stood among those of its kind.
    places = {
        kind: [list_axes(w.letters, kind).index(axis) for axis in order]
        for kind, order in orders.items()
    }
    num_batch = len(places["b"])
    u_order = [
        *places["b"],
        *(num_batch + place for place in places["i"]),
        w.u.ndim - 1,
    ]
    v_order = [
        *places["b"],
        num_batch,
        *(num_batch + 1 + place for place in places["o"]),
    ]
    return replace(
        w,
        letters=letters,
        u=jnp.transpose(w.u, u_order),
        v=jnp.transpose(w.v, v_order),
        base=None if w.base is None else jnp.transpose(w.base, permutation),
    )


@quax.register(lax.reshape_p)
def reshape(w: LiftedWeight, *, new_sizes, dimensions, **params):
    moved = None if dimensions is not None else reshape_weight(w, new_sizes)
    if moved is None:
        return lax.reshape(
            form(w, "`reshape` of inputs with outputs"), new_sizes, dimensions
        )
    return settle(moved)


@quax.register(lax.squeeze_p)
def squeeze(w: LiftedWeight, *, dimensions):
    shape = find_shape(w)
    return settle(_drop_axes(w, [axis % len(shape) for axis in dimensions]))


@quax.register(lax.broadcast_in_dim_p)
def broadcast(
    w: LiftedWeight, *dynamic: ArrayLike, shape, broadcast_dimensions, **params
):
    old, kept = find_shape(w), set(broadcast_dimensions)
    grows = any(
        shape[new] != size for new, size in zip(broadcast_dimensions, old, strict=True)
    )
    if grows or any(size != 1 for axis, size in enumerate(shape) if axis not in kept):
        params |= {"shape": shape, "broadcast_dimensions": broadcast_dimensions}
        return LiftedWeight.default(lax.broadcast_in_dim_p, (w, *dynamic), params)
    return reshape_weight(w, shape)


@quax.register(lax.slice_p)
def slice_static(w: LiftedWeight, *, start_indices, limit_indices, strides):
    for axis, size in enumerate(find_shape(w)):
        stride = 1 if strides is None else strides[axis]
        if (start_indices[axis], limit_indices[axis], stride) != (0, size, 1):
            cut = (start_indices[axis], limit_indices[axis], stride)
            w = _slice_axis(w, axis, *cut)
    return w


@quax.register(lax.dynamic_slice_p)
def slice_dynamic(w: LiftedWeight, *starts: ArrayLike, slice_sizes):
    for axis, size in enumerate(find_shape(w)):
        if slice_sizes[axis] != size:
            cut = (starts[axis], slice_sizes[axis])
            w = _map_axis(
                w, axis, lambda a, at, cut=cut: lax.dynamic_slice_in_dim(a, *cut, at)
            )
    return w


@quax.register(lax.split_p)
def split(w: LiftedWeight, *, sizes, axis):
    parts, start = [], 0
    for size in map(int, sizes):
        parts.append(_slice_axis(w, axis, start, start + size))
        start += size
    return parts


@quax.register(lax.neg_p)
def negate(w: LiftedWeight):
    return _scale(w, jnp.asarray(-1, w.dtype_seen))


@quax.register(lax.mul_p)
def multiply(w: LiftedWeight, factor: ArrayLike, **params):
    if jnp.size(factor) != 1:
        return LiftedWeight.default(lax.mul_p, (w, factor), params)
    return _scale(w, factor)


@quax.register(lax.mul_p)
def multiply_from_left(factor: ArrayLike, w: LiftedWeight, **params):
    return multiply(w, factor, **params)


@quax.register(lax.div_p)
def divide(w: LiftedWeight, divisor: ArrayLike, **params):
    if jnp.size(divisor) != 1:
        return LiftedWeight.default(lax.div_p, (w, divisor), params)
    return _scale(w, 1 / jnp.asarray(divisor))


@quax.register(lax.stop_gradient_p)
def stop_gradient(w: LiftedWeight):
    return map_arrays(w, lambda name, array: lax.stop_gradient(array))


@quax.register(lax.copy_p)
def copy(w: LiftedWeight):
    return w


@quax.register(lax.sharding_constraint_p)
def constrain_sharding(w: LiftedWeight, **params):
    # It is about the large array; the thin factors go where the compiler puts them.
    base = None if w.base is None else lax.sharding_constraint_p.bind(w.base, **params)
    return replace(w, base=base)


def _scale(w, factor):
    factor = jnp.reshape(jnp.asarray(factor), ())
    base = None if w.base is None else w.base * factor.astype(w.base.dtype)
    return replace(w, base=base, u=w.u * factor.astype(w.u.dtype))


def _slice_axis(w, axis, *cut):
    return _map_axis(w, axis, lambda array, at: lax.slice_in_dim(array, *cut, axis=at))


def _map_axis(w, axis, cut):
    """Return the weight with cut(array, axis) done to what has that axis of the array."""
    places = dict(locate(w.letters, axis)) | {"base": axis}
    return map_arrays(
        w, lambda name, array: cut(array, places[name]) if name in places else array
    )


def _drop_axes(w, axes):
    """Return the weight without axes of size one."""
    places = {
        name: [
            at
            for axis in axes
            for found, at in locate(w.letters, axis)
            if found == name
        ]
        for name in ("u", "v")
    } | {"base": list(axes)}
    letters = "".join(
        letter for axis, letter in enumerate(w.letters) if axis not in axes
    )
    dropped = map_arrays(w, lambda name, array: jax.lax.squeeze(array, places[name]))
    return replace(dropped, letters=letters)
