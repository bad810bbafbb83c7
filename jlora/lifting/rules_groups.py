"""The rule for ragged products: groups of rows, each times the matrix of its group."""

from typing import Any

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.extend.core import Primitive
from jaxtyping import ArrayLike

from jlora._numerics import common_dtype, compute_dtype, thin_dtype
from jlora._types import Array
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    read_base,
)


def _find_primitive() -> Primitive:
    """Return the primitive of `jax.lax.ragged_dot`, which has no public name."""
    shapes = [((1, 1), "float32"), ((1, 1, 1), "float32"), ((1,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.make_jaxpr(lax.ragged_dot)(*arguments).jaxpr.eqns[-1].primitive


ragged_dot_p = _find_primitive()


@quax.register(ragged_dot_p)
def multiply_stack(
    x: ArrayLike, w: LiftedWeight, group_sizes: ArrayLike, **params: Any
) -> Array:
    numbers = params["ragged_dot_dimension_numbers"]
    if not _is_factorable(w.layout, numbers) or params["group_offset"] is not None:
        return LiftedWeight.default(ragged_dot_p, (x, w, group_sizes), params)

    # Sum in at least float32, and cast to the dtype that the program asks for.
    x, group_sizes = jnp.asarray(x), jnp.asarray(group_sizes)
    operand_dtype = common_dtype(x.dtype, w.dtype_seen)
    dtype = params["preferred_element_type"] or operand_dtype
    settings = {
        "precision": params["precision"],
        "preferred_element_type": compute_dtype(operand_dtype, dtype),
    }

    # Start with the factor that shares its axis with x, as [groups, shared, rank].
    first, second = w.u, w.v
    contracted = numbers.dot_dimension_numbers[0][1][0]
    if w.layout[contracted] == "o":
        first, second = w.v.swapaxes(1, 2), w.u.swapaxes(1, 2)
    operand = x.astype(operand_dtype)
    thin = lax.ragged_dot(operand, first.astype(operand_dtype), group_sizes, **settings)
    thin = thin.astype(thin_dtype(operand_dtype))
    delta = lax.ragged_dot(thin, second.astype(thin.dtype), group_sizes, **settings)
    if w.base is None:
        return delta.astype(dtype)

    plain = ragged_dot_p.bind(x, read_base(w), group_sizes, **params | settings)
    return (plain + delta).astype(dtype)


def _is_factorable(layout: str, numbers: lax.RaggedDotDimensionNumbers) -> bool:
    """Return whether rows in groups meet a stack of matrices, one for each group."""
    (left, right), batch = numbers.dot_dimension_numbers
    groups = [layout[axis] for axis in numbers.rhs_group_dimensions]
    contracted = [layout[axis] for axis in right]
    return (
        sorted(layout) == ["b", "i", "o"]
        and (list(numbers.lhs_ragged_dimensions), list(left)) == ([0], [1])
        and groups == ["b"]
        and contracted in (["i"], ["o"])
        and not any(batch)
    )
