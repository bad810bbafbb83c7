"""The leaves of a tree of weights: by path, and as matrices."""

import math

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
    return tuple(
        tuple(shape[axis] for axis in list_axes(letters, kind)) for kind in "bio"
    )


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
