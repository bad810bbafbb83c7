"""Rules for what multiplies a weight: products of any orientation, lookups, convolutions."""

import string

import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from jlora._numerics import common_dtype, compute_dtype
from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    form,
    locate,
    replace,
    reshape_weight,
    settle,
)
from jlora.lifting.rules_layout import transpose


@quax.register(lax.dot_general_p)
def multiply_weight(w: LiftedWeight, x: ArrayLike, *, dimension_numbers, **params):
    return _multiply(w, jnp.asarray(x), dimension_numbers, params, is_left=True)


@quax.register(lax.dot_general_p)
def multiply_by_weight(x: ArrayLike, w: LiftedWeight, *, dimension_numbers, **params):
    return _multiply(w, jnp.asarray(x), dimension_numbers, params, is_left=False)


def _multiply(w, x, dimension_numbers, params, *, is_left):
    sides = (w, x) if is_left else (x, w)
    contracting, batch = dimension_numbers
    labels = _label_axes(
        [find_shape(w) if side is w else side.shape for side in sides],
        contracting,
        batch,
    )
    w_labels, x_labels = labels if is_left else labels[::-1]
    shared = [labels[0][axis] for axis in batch[0]]
    free = [
        label
        for at in (0, 1)
        for axis, label in enumerate(labels[at])
        if axis not in contracting[at] and axis not in batch[at]
    ]
    dtype = params.get("preferred_element_type") or common_dtype(x.dtype, w.dtype_seen)
    working = common_dtype(x.dtype, w.dtype_seen)
    settings = {
        "precision": params.get("precision"),
        "preferred_element_type": compute_dtype(working, dtype),
    }
    delta = _contract(
        w, w_labels, x.astype(working), x_labels, [*shared, *free], is_left, settings
    )
    if w.base is None:
        return delta.astype(dtype)
    operands = (w.base, x) if is_left else (x, w.base)
    plain = lax.dot_general(
        *operands,
        dimension_numbers,
        out_sharding=params.get("out_sharding"),
        **settings,
    )
    return (plain + delta).astype(dtype)


def _label_axes(shapes, contracting, batch):
    """Return a letter for each axis of both operands, shared where they meet."""
    names = iter(string.ascii_letters)
    labels = [[None] * len(shape) for shape in shapes]
    for meeting in (contracting, batch):
        for left, right in zip(*meeting, strict=True):
            labels[0][left] = labels[1][right] = next(names)
    return [[label or next(names) for label in side] for side in labels]


def _contract(w, w_labels, x, x_labels, out, is_left, settings):
    """Return x contracted with one factor, and the thin result with the other."""
    taken = {*w_labels, *x_labels}
    rank = next(name for name in string.ascii_letters if name not in taken)
    batch, inputs, outputs = (
        [w_labels[axis] for axis in list_axes(w.letters, kind)] for kind in "bio"
    )
    u = w.u.astype(x.dtype), [*batch, *inputs, rank]
    v = w.v.astype(x.dtype), [*batch, rank, *outputs]
    meets = [label in x_labels for label in inputs]
    first, second = (u, v) if any(meets) or not outputs else (v, u)
    kept = [
        label
        for label in dict.fromkeys([*x_labels, *first[1]])
        if label in out or label in second[1]
    ]
    thin = _einsum(x, x_labels, *first, kept, is_left, settings).astype(x.dtype)
    return _einsum(thin, kept, *second, out, is_left, settings)


def _einsum(x, x_labels, factor, factor_labels, out, is_left, settings):
    operands = [(x_labels, x), (factor_labels, factor)]
    if is_left:
        operands.reverse()
    names = ",".join("".join(labels) for labels, _ in operands)
    arrays = [array for _, array in operands]
    return jnp.einsum(f"{names}->{''.join(out)}", *arrays, **settings)


@quax.register(lax.conv_general_dilated_p)
def convolve(x: ArrayLike, w: LiftedWeight, **params):
    numbers = params["dimension_numbers"]
    out_axis, *input_axes = numbers.rhs_spec
    fits = w.letters[out_axis] == "o" and all(
        w.letters[axis] == "i" for axis in input_axes
    )
    if (
        not fits
        or params["feature_group_count"] != 1
        or params["batch_group_count"] != 1
    ):
        return LiftedWeight.default(lax.conv_general_dilated_p, (x, w), params)
    x = jnp.asarray(x)
    dtype = params["preferred_element_type"] or common_dtype(x.dtype, w.dtype_seen)
    params |= {"preferred_element_type": compute_dtype(x.dtype, dtype)}
    kernel = jnp.moveaxis(w.u, -1, out_axis).astype(x.dtype)
    thin = lax.conv_general_dilated_p.bind(x, kernel, **params).astype(x.dtype)
    features = numbers.out_spec[1]
    delta = jnp.tensordot(
        thin,
        w.v.astype(x.dtype),
        ((features,), (0,)),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    delta = jnp.moveaxis(delta, -1, features)
    if w.base is None:
        return delta.astype(dtype)
    plain = lax.conv_general_dilated_p.bind(x, w.base, **params)
    return (plain + delta).astype(dtype)


@quax.register(lax.gather_p)
def look_up(w: LiftedWeight, indices: ArrayLike, **params):
    indices, axis = _find_axis(find_shape(w), jnp.asarray(indices), params)
    if axis is None:
        return LiftedWeight.default(lax.gather_p, (w, indices), params)
    numbers = params["dimension_numbers"]
    gathered = {
        name: _gather(getattr(w, name), at, indices, params, is_factor=name != "base")
        for name, at in [*locate(w.letters, axis), ("base", axis)]
        if getattr(w, name) is not None
    }
    if w.base is None and params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        gathered["base"] = _fill_nothing(find_shape(w), axis, indices, params)
    num_new = indices.ndim - 1
    letters = w.letters[axis] * num_new + w.letters[:axis] + w.letters[axis + 1 :]
    found = replace(w, letters=letters, **_sort_new_axes(w, axis, num_new, gathered))
    if axis not in numbers.collapsed_slice_dims:
        shape = find_shape(found)
        found = reshape_weight(
            found, (*shape[: num_new + axis], 1, *shape[num_new + axis :])
        )
    order = _order_result(num_new, len(found.letters), numbers.offset_dims)
    found = transpose(found, permutation=order)
    # What was looked up is activations; a matrix taken from a stack is a weight still.
    if w.letters[axis] == "b":
        return settle(found)
    return form(replace(found, can_form=True), "`gather`")


def _find_axis(shape, indices, params):
    """Return (indices [..., 1], axis) of a lookup along one axis; axis None: it is another one."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    cut = [axis for axis, size in enumerate(shape) if sizes[axis] != size]
    axis = cut[0] if cut else numbers.start_index_map[0]
    places = numbers.start_index_map
    # Where the whole of an axis is taken its index can only be zero, but for a fill.
    others_are_zero = (
        len(places) == 1 or params["mode"] != lax.GatherScatterMode.FILL_OR_DROP
    )
    fits = (
        len(cut) <= 1
        and sizes[axis] == 1
        and axis in places
        and others_are_zero
        and set(numbers.collapsed_slice_dims) <= {axis}
        and not numbers.operand_batching_dims
    )
    if not fits:
        return indices, None
    place = places.index(axis)
    return indices[..., place : place + 1], axis


def _gather(array, axis, indices, params, *, is_factor):
    """Return array[..., indices, ...] with the axes of the indices in front."""
    num_new, num_kept = indices.ndim - 1, array.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(num_new, num_new + num_kept)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if at == axis else size for at, size in enumerate(array.shape))
    changed = params | {"dimension_numbers": numbers, "slice_sizes": sizes}
    if is_factor:  # what is filled in comes with the base
        changed["fill_value"] = 0
    return lax.gather_p.bind(array, indices, **changed)


def _fill_nothing(shape, axis, indices, params):
    """Return what a lookup in zeros gives: zeros, and what is filled in for missing indices."""
    thin = jnp.zeros(
        [size if at == axis else 1 for at, size in enumerate(shape)], jnp.float32
    )
    found = _gather(thin, axis, indices, params, is_factor=False)
    return jnp.broadcast_to(
        found, (*found.shape[: indices.ndim - 1], *shape[:axis], *shape[axis + 1 :])
    )


def _sort_new_axes(w, axis, num_new, gathered):
    """Return the gathered arrays, the new axes of each among those of their kind."""
    num_batch = w.letters.count("b")
    starts = {
        "base": 0,
        "u": num_batch if w.letters[axis] == "i" else 0,
        "v": num_batch + 1 if w.letters[axis] == "o" else 0,
    }
    return {
        name: jnp.moveaxis(
            array, range(num_new), range(starts[name], starts[name] + num_new)
        )
        for name, array in gathered.items()
    }


def _order_result(num_new, ndim, offset_dims):
    """Return the permutation that puts the axes that were kept at `offset_dims`."""
    kept, new = iter(range(num_new, ndim)), iter(range(num_new))
    return tuple(
        next(kept) if axis in offset_dims else next(new) for axis in range(ndim)
    )
