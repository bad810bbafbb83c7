"""The rule for convolutions with a weight, also in groups of features."""

from typing import Any

import jax.numpy as jnp
import quax
from jax import lax
from jaxtyping import ArrayLike

from jlora._numerics import common_dtype, compute_dtype, thin_dtype
from jlora._types import Array
from jlora.lifting.lifted_weight import (
    LiftedWeight,
    read_base,
)


@quax.register(lax.conv_general_dilated_p)
def convolve(x: ArrayLike, w: LiftedWeight, **params: Any) -> Array:
    if not _is_factorable(w.layout, params):
        return LiftedWeight.default(lax.conv_general_dilated_p, (x, w), params)

    # Sum in at least float32, and cast to the dtype that the program asks for.
    x = jnp.asarray(x)
    dtype = params["preferred_element_type"] or common_dtype(x.dtype, w.dtype_seen)
    params |= {"preferred_element_type": compute_dtype(x.dtype, dtype)}

    # Convolve each group of features with u, a kernel of few output features.
    numbers = params["dimension_numbers"]
    out_axis, features = numbers.rhs_spec[0], numbers.out_spec[1]
    num_groups, rank = params["feature_group_count"], w.u.shape[-1]
    kernel = jnp.concatenate([w.u] * num_groups, -1).astype(x.dtype)
    kernel = jnp.moveaxis(kernel, -1, out_axis)
    thin = lax.conv_general_dilated_p.bind(x, kernel, **params)

    # Multiply the features of a group by its columns of v.
    thin = jnp.moveaxis(thin, features, -1).astype(thin_dtype(x.dtype))
    thin = thin.reshape(*thin.shape[:-1], num_groups, rank)
    delta = jnp.einsum(
        "...gr,rgo->...go",
        thin,
        w.v.reshape(rank, num_groups, -1).astype(thin.dtype),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    delta = jnp.moveaxis(delta.reshape(*delta.shape[:-2], -1), -1, features)
    if w.base is None:
        return delta.astype(dtype)

    plain = lax.conv_general_dilated_p.bind(x, read_base(w), **params)
    return (plain + delta).astype(dtype)


def _is_factorable(layout: str, params: dict[str, Any]) -> bool:
    """Return whether a convolution with u and a product with v make the convolution."""
    out_axis, *other_axes = params["dimension_numbers"].rhs_spec
    has_one_output = layout[out_axis] == "o"
    has_inputs = all(layout[axis] == "i" for axis in other_axes)
    return has_one_output and has_inputs and params["batch_group_count"] == 1
