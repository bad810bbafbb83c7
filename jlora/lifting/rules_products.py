"""Rules for matrix products with a weight, in any orientation."""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from jlora._numerics import common_dtype, compute_dtype, thin_dtype
from jlora._types import AnyArray, Array, Float
from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    find_shape,
    read_base,
)
from jlora.lifting.quantized_bases import multiply_quantized

# Axes of the left operand, and of the right one.
AxesOfBoth = tuple[Sequence[int], Sequence[int]]


class _Labels(NamedTuple):
    """One letter per axis, as in an einsum: axes with one letter are multiplied."""

    w: list[str]
    x: list[str]
    out: list[str]


class _Operand(NamedTuple):
    """An array and the letters of its axes."""

    array: Float[Array, "..."]
    labels: list[str]


@quax.register(lax.dot_general_p)
def multiply_left(
    w: LiftedWeight,
    x: ArrayLike,
    *,
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    **params: Any,
) -> Array:
    return _multiply(w, jnp.asarray(x), dimension_numbers, params, is_left=True)


@quax.register(lax.dot_general_p)
def multiply_right(
    x: ArrayLike,
    w: LiftedWeight,
    *,
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    **params: Any,
) -> Array:
    return _multiply(w, jnp.asarray(x), dimension_numbers, params, is_left=False)


def _multiply(
    w: LiftedWeight,
    x: Array,
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    params: dict[str, Any],
    *,
    is_left: bool,
) -> Array:
    """Return the product of a weight and an array, its terms base and u @ v summed.

    Args:
        w: the weight.
        x: the array.
        dimension_numbers: (contracting, batch) axes of the left and the right operand.
        params: the other parameters of the primitive.
        is_left: whether w is the left operand.
    """
    # Sum in at least float32, and cast to the dtype that the program asks for.
    operand_dtype = common_dtype(x.dtype, w.dtype_seen)
    dtype = params.get("preferred_element_type") or operand_dtype
    settings = {
        "precision": params.get("precision"),
        "preferred_element_type": compute_dtype(operand_dtype, dtype),
    }

    fused = multiply_quantized(w, x.astype(operand_dtype), dimension_numbers, is_left)
    if fused is not None:
        return fused.astype(dtype)

    # Multiply by the factors.
    labels = _label_axes(find_shape(w), x.shape, dimension_numbers, is_left=is_left)
    delta = _multiply_factors(
        w, x.astype(operand_dtype), labels, settings, is_left=is_left
    )
    if w.base is None:
        return delta.astype(dtype)

    # Multiply by the base as the plain program does.
    base = read_base(w)
    operands = (base, x) if is_left else (x, base)
    settings["out_sharding"] = params.get("out_sharding")
    plain = _multiply_general(*operands, dimension_numbers, settings)
    return (plain + delta).astype(dtype)


def _multiply_general(
    left: AnyArray,
    right: AnyArray,
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    settings: dict[str, Any],
) -> Array:
    """Return the product of two arrays, with their batch axes moved to the front.

    XLA's CPU backend has no product of bfloat16 operands summed in float32 whose batch
    axes stand elsewhere.
    """
    contracting, batch = dimension_numbers
    moved = []
    for array, axes, batch_axes in zip((left, right), contracting, batch, strict=True):
        others = [axis for axis in range(array.ndim) if axis not in batch_axes]
        order = [*batch_axes, *others]
        moved.append((array.transpose(order), [order.index(axis) for axis in axes]))

    (left, left_axes), (right, right_axes) = moved
    front = list(range(len(batch[0])))
    numbers = ((left_axes, right_axes), (front, front))
    return lax.dot_general(left, right, numbers, **settings)


def _label_axes(
    w_shape: Sequence[int],
    x_shape: Sequence[int],
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    *,
    is_left: bool,
) -> _Labels:
    """Return a letter for each axis: shared axes of both operands have the same one."""
    contracting, batch = dimension_numbers
    letters = iter(string.ascii_letters)
    shapes = (w_shape, x_shape) if is_left else (x_shape, w_shape)
    labels: list[list[Any]] = [[None] * len(shape) for shape in shapes]

    # Label the axes that both operands have, then the others.
    for shared in (contracting, batch):
        for left_axis, right_axis in zip(*shared, strict=True):
            labels[0][left_axis] = labels[1][right_axis] = next(letters)
    left, right = ([label or next(letters) for label in side] for side in labels)

    # The result has the batch axes, then the free axes of the left and the right.
    out = [left[axis] for axis in batch[0]]
    used = {*out, *(left[axis] for axis in contracting[0])}
    out += [label for label in (*left, *right) if label not in used]
    return _Labels(left, right, out) if is_left else _Labels(right, left, out)


def _multiply_factors(
    w: LiftedWeight,
    x: Array,
    labels: _Labels,
    settings: dict[str, Any],
    *,
    is_left: bool,
) -> Array:
    """Return x times one factor, and this thin result times the other factor."""
    # Label the factors: u is [*batch, *inputs, rank], v is [*batch, rank, *outputs].
    used = {*labels.w, *labels.x}
    rank = next(letter for letter in string.ascii_letters if letter not in used)
    batch, inputs, outputs = (
        [labels.w[axis] for axis in list_axes(w.layout, letter)] for letter in "bio"
    )
    u = _Operand(w.u.astype(x.dtype), [*batch, *inputs, rank])
    v = _Operand(w.v.astype(x.dtype), [*batch, rank, *outputs])
    dtype = thin_dtype(x.dtype)

    # The first factor must share inputs or outputs with x, or the first product is not
    # thin: x @ w starts with u, and w @ x with v.
    shares_inputs = any(label in labels.x for label in inputs)
    first, second = (u, v) if shares_inputs or not outputs else (v, u)

    # Sum over each axis as soon as nothing else has it.
    needed = {*labels.out, *second.labels}
    all_labels = dict.fromkeys([*labels.x, *first.labels])
    thin_labels = [label for label in all_labels if label in needed]
    operand = _Operand(x, labels.x)
    thin = _einsum(operand, first, thin_labels, settings, is_left).astype(dtype)
    second = second._replace(array=second.array.astype(dtype))
    return _einsum(_Operand(thin, thin_labels), second, labels.out, settings, is_left)


def _einsum(
    x: _Operand,
    factor: _Operand,
    out: list[str],
    settings: dict[str, Any],
    factor_is_left: bool,
) -> Array:
    # Batch axes come first, for the reason in `_multiply_general`.
    batch = [label for label in out if label in x.labels and label in factor.labels]
    x, factor = (_move_to_front(operand, batch) for operand in (x, factor))

    left, right = (factor, x) if factor_is_left else (x, factor)
    subscripts = f"{''.join(left.labels)},{''.join(right.labels)}->{''.join(out)}"
    return jnp.einsum(subscripts, left.array, right.array, **settings)


def _move_to_front(operand: _Operand, first: list[str]) -> _Operand:
    labels = [*first, *(label for label in operand.labels if label not in first)]
    order = [operand.labels.index(label) for label in labels]
    return _Operand(operand.array.transpose(order), labels)
