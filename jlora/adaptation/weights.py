"""The leaves of a tree of weights: by path, and as matrices."""

import math
import zlib

import jax
import jax.numpy as jnp


def list_leaves(params, is_leaf=None):
    """Return [(path, leaf)] of a pytree; a path joins its keys with "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return [(format_path(path), leaf) for path, leaf in leaves]


def map_leaves(fn, params, is_leaf=None):
    """Return the tree with fn(path, leaf) in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(format_path(path), leaf), params, is_leaf=is_leaf
    )


def format_path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fold_path(key, path):
    """Return a key of this path's own: by its name, so that other paths change nothing."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def why_not_a_matrix(leaf, layout="io"):
    """Return why a leaf cannot be factorised, or None if it can."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"is a {type(leaf).__name__}, not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"has dtype {leaf.dtype}, not a real floating one"
    shape = tuple(leaf.shape)
    if len(shape) < len(layout):
        number = {2: "two", 3: "three", 4: "four", 5: "five"}.get(len(layout), len(layout))
        named = "" if layout == "io" else f" (layout {layout!r})"
        return f"has shape {shape}, fewer than {number} axes{named}"
    if 0 in shape:
        return f"has shape {shape}, no elements"
    return None


# A layout names each axis of an array as it is stored: "b" batch, "i" input, "o" output. Axes
# before the ones it names are batch axes.


def complete_layout(layout, ndim):
    """Return the layout with a letter for each of `ndim` axes."""
    return "b" * (ndim - len(layout)) + layout


def list_axes(letters, kinds):
    """Return the axes whose letter is one of `kinds`, in order."""
    return [axis for axis, letter in enumerate(letters) if letter in kinds]


def sort_axes(letters):
    """Return all axes: batch axes, inputs, outputs."""
    return tuple(axis for kind in "bio" for axis in list_axes(letters, kind))


def invert(permutation):
    """Return the permutation that undoes it."""
    return tuple(sorted(range(len(permutation)), key=permutation.__getitem__))


def split_shape(shape, layout):
    """Return the sizes of the batch, input and output axes of an array of `shape`."""
    letters = complete_layout(layout, len(shape))
    return tuple(tuple(shape[axis] for axis in list_axes(letters, kind)) for kind in "bio")


def matrix_shape(shape, layout):
    """Return [..., m, n], the shape of the matrix view of an array of `shape`."""
    batch, inputs, outputs = split_shape(shape, layout)
    return (*batch, math.prod(inputs), math.prod(outputs))


def view_matrix(array, layout):
    """Return the array as [..., m, n]: batch axes, all inputs as one, all outputs as one."""
    shape = matrix_shape(array.shape, layout)
    order = sort_axes(complete_layout(layout, array.ndim))
    if order != tuple(range(array.ndim)):
        array = array.transpose(order)
    return array.reshape(shape)


def restore_layout(matrix, layout, shape):
    """Return the array of `shape` whose matrix view is `matrix`."""
    order = sort_axes(complete_layout(layout, len(shape)))
    array = matrix.reshape(tuple(shape[axis] for axis in order))
    if order == tuple(range(len(shape))):
        return array
    return array.transpose(invert(order))
