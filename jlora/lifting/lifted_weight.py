"""`LiftedWeight`: an array that stays base + u @ v as a program reshapes it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import quax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jaxtyping import ArrayLike

from jlora._numerics import matmul
from jlora._types import AnyArray, Array, Float
from jlora.adaptation.adapted_weight import AdaptedWeight, read_product_base
from jlora.layouts import (
    complete_layout,
    invert_permutation,
    list_axes,
    sort_axes,
    split_shape,
)
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import read_array


class LiftedWeight(quax.ArrayValue):
    """An array base + u @ v whose axes are batch axes, inputs and outputs in any order.

    The layout has one letter per axis of the array: "b" batch, "i" input, "o" output.
    Axes of one kind have the same order in the array and in the factors. The scale is
    multiplied into u.
    """

    # In the layout; a quantised base in a layout of its own. None: no base.
    base: Float[AnyArray, "..."] | QuantizedArray | None
    u: Float[Array, "..."]  # [*batch, *inputs, rank]
    v: Float[Array, "..."]  # [*batch, rank, *outputs]
    layout: str = equinox.field(static=True)
    path: str = equinox.field(static=True)  # in the arguments of fn, for messages
    dtype_seen: np.dtype = equinox.field(static=True)  # the dtype that the program sees
    can_materialize: bool = equinox.field(static=True)  # by the user's choice

    def aval(self) -> ShapedArray:
        return ShapedArray(find_shape(self), self.dtype_seen)

    def materialise(self) -> Array:
        return materialize(self, "a value of the result")

    @staticmethod
    def default(
        primitive: Primitive, values: Sequence[Any], params: dict[str, Any]
    ) -> Any:
        """Return the result of an operation without a rule, on materialised weights."""
        arrays = [to_array(value, f"`{primitive}`") for value in values]
        return primitive.bind(*arrays, **params)


def lift_weight(
    weight: AdaptedWeight, path: str, *, can_materialize: bool
) -> LiftedWeight:
    """Return an adapted weight as a `LiftedWeight` that is named `path` in messages."""
    u, v = weight.factors
    u = u * jnp.asarray(weight.scale, u.dtype)

    # Frozen columns of v have no gradient.
    num_columns = weight.num_columns
    if num_columns is not None and num_columns < v.shape[-1]:
        frozen, trained = v[..., :-num_columns], v[..., -num_columns:]
        v = jnp.concatenate([jax.lax.stop_gradient(frozen), trained], axis=-1)

    # A quantised base stays quantised as long as only products and transposes meet it.
    base = read_product_base(weight)

    # Split the rows of u and the columns of v into the axes of the weight.
    batch, inputs, outputs = split_shape(weight.shape, weight.layout)
    rank = u.shape[-1]
    return LiftedWeight(
        base=base,
        u=u.reshape(*batch, *inputs, rank),
        v=v.reshape(*batch, rank, *outputs),
        layout=complete_layout(weight.layout, weight.ndim),
        path=path,
        dtype_seen=np.dtype(weight.dtype),
        can_materialize=can_materialize,
    )


def materialize(weight: LiftedWeight, operation: str) -> Float[Array, "..."]:
    """Return the full array, or raise if the user did not allow that.

    Args:
        weight: the weight.
        operation: the one that needs the full array, for the message.
    """
    if not weight.can_materialize:
        raise ValueError(
            f"{weight.path}: `fn` must use an adapted weight only in products, "
            "lookups, convolutions, casts, slices and reshapes, got "
            f"{operation} on shape {find_shape(weight)} and layout {weight.layout!r}. "
            "Check the layout in its rule, pass materialize=True, leave the weight out "
            "of the plan, or use jlora.on_merged."
        )

    # Multiply as matrices: all inputs as rows, all outputs as columns.
    num_batch = weight.layout.count("b")
    batch, inputs = weight.u.shape[:num_batch], weight.u.shape[num_batch:-1]
    rank, *outputs = weight.v.shape[num_batch:]
    u = weight.u.reshape(*batch, -1, rank)
    v = weight.v.reshape(*batch, rank, -1)
    delta = matmul(u, v).reshape(*batch, *inputs, *outputs)

    # Restore the layout and add the base.
    delta = jnp.transpose(delta, invert_permutation(sort_axes(weight.layout)))
    total = delta
    if weight.base is not None:
        total = delta + read_base(weight).astype(delta.dtype)
    return total.astype(weight.dtype_seen)


def read_base(weight: LiftedWeight) -> Float[AnyArray, "..."]:
    """Return the base as a plain array; a quantised one is dequantised."""
    return read_array(weight.base)


def to_array(value: LiftedWeight | ArrayLike, operation: str) -> ArrayLike:
    """Return the value as an array: a weight is materialised, an array unchanged."""
    return materialize(value, operation) if isinstance(value, LiftedWeight) else value


def to_array_if_vector(weight: LiftedWeight) -> LiftedWeight | Array:
    """Return the weight, or its values if no inputs or no outputs remain.

    Without one of the two the array is a vector, or a batch of vectors. It is as small
    as a factor, so it is materialised whether the user allowed that or not.
    """
    if "i" in weight.layout and "o" in weight.layout:
        return weight
    return materialize(replace(weight, can_materialize=True), "a vector")


def replace(weight: LiftedWeight, **changes: Any) -> LiftedWeight:
    """Return the weight with some fields changed."""
    names = ("base", "u", "v", "layout", "path", "dtype_seen", "can_materialize")
    return LiftedWeight(**{name: getattr(weight, name) for name in names} | changes)


def find_shape(weight: LiftedWeight) -> tuple[int, ...]:
    """Return the shape of the full array."""
    num_batch = weight.layout.count("b")
    sizes: dict[str, Iterator[int]] = {
        "b": iter(weight.u.shape[:num_batch]),
        "i": iter(weight.u.shape[num_batch:-1]),
        "o": iter(weight.v.shape[num_batch + 1 :]),
    }
    return tuple(next(sizes[letter]) for letter in weight.layout)


def locate_axis(layout: str, axis: int) -> dict[str, int]:
    """Return {"u" or "v": axis of that factor} for the factors that have an axis."""
    num_batch, letter = layout.count("b"), layout[axis]
    index = list_axes(layout, letter).index(axis)
    if letter == "b":
        return {"u": index, "v": index}
    return {"u": num_batch + index} if letter == "i" else {"v": num_batch + 1 + index}


def map_arrays(
    weight: LiftedWeight,
    fn: Callable[[str, AnyArray], AnyArray],
    map_quantized: Callable[[QuantizedArray], QuantizedArray | None],
) -> LiftedWeight:
    """Return the weight with fn(name, array) in place of its base, u and v.

    Args:
        weight: the weight.
        fn: function of "base", "u" or "v", and of that array.
        map_quantized: the same for a quantised base. If it returns None, the base is
            dequantised for `fn`.
    """
    base = None
    if isinstance(weight.base, QuantizedArray):
        base = map_quantized(weight.base)
    if base is None and weight.base is not None:
        base = fn("base", read_base(weight))
    return replace(weight, base=base, u=fn("u", weight.u), v=fn("v", weight.v))
