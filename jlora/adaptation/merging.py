"""Adapted weights → plain ones."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._types import Array, PRNGKey, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted, view_matrices
from jlora.adaptation.paths import fold_path, map_leaves
from jlora.layouts import restore_layout
from jlora.quantization.quantized_array import QuantizedArray
from jlora.reconstruction.dense import reconstruct
from jlora.reconstruction.rounding import check_rounding


def merge(
    adapted: Tree,
    *,
    rounding: Literal["nearest", "stochastic", "compensated"] = "nearest",
    key: PRNGKey | None = None,
    requantize: bool = False,
) -> Tree:
    """Return the tree of plain weights, base + scale * u @ v in their own dtypes.

    Args:
        adapted: tree from `adapt`.
        rounding: static, how the sums become bfloat16 or float16, see `reconstruct`.
            Weights of other dtypes are rounded to the nearest.
        key: one typed PRNG key for "stochastic", consumed; folded with each path. None
            for the others.
        requantize: static. True: a weight with a quantised base becomes a
            `QuantizedArray` in the format of that base again. Small deltas are mostly
            lost, see `jlora.adaptation.measure_delta_loss`; outside of jit a warning
            names the weights that keep less than half of theirs. False: it becomes a
            plain array.

    Returns:
        The tree that `adapt` was given, in structure, layouts and dtypes; NumPy arrays
        where the bases are. With rounding="compensated" a `CompensatedWeight` in place
        of each adapted weight of 16 bits.

    Raises:
        TypeError, ValueError: a key or a rounding that `reconstruct` refuses.
        TypeError: `requantize` is no bool.
        ValueError: outside of jit, a float16 weight whose sum is beyond its range.

    Cost: one pass over each adapted weight.

    Accuracy: summed in at least float32, rounded once.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora"))
        >>> jlora.merge(jlora.adapt(params, plan, key=jax.random.key(0)))["w"].dtype
        dtype(bfloat16)
    """
    check_rounding(rounding, key, jnp.dtype(jnp.bfloat16))
    if not isinstance(requantize, bool):
        raise TypeError(
            f"`requantize` must be True or False, got {type(requantize).__name__}. "
            "Pass one of them."
        )
    requantized: dict[str, Any] = {}

    def merge_leaf(path: str, leaf: Any) -> Any:
        if not is_adapted(leaf):
            return leaf
        if requantize and isinstance(leaf.base, QuantizedArray):
            from jlora.adaptation.requantization import requantize_weight

            requantized[path] = requantize_weight(leaf)
            return requantized[path].array
        if jnp.finfo(leaf.dtype).bits != 16:
            return merge_weight(leaf)
        own_key = None if key is None else fold_path(key, path)
        merged = merge_weight(leaf, rounding=rounding, key=own_key)
        if leaf.dtype == jnp.float16:
            _check_range(path, leaf, merged)
        return merged

    merged = map_leaves(merge_leaf, adapted, is_leaf=is_adapted)
    if requantized:
        from jlora.adaptation.requantization import warn_of_loss

        warn_of_loss(requantized)
    return merged


def _check_range(path: str, weight: AdaptedWeight, merged: Any) -> None:
    """Refuse infinities that neither the base nor the factors have."""
    arrays = jax.tree.leaves(merged)
    parts = [part for part in (weight.base, *weight.factors) if part is not None]
    if any(isinstance(array, Tracer) for array in (*arrays, *parts)):
        return
    is_finite = all(bool(jnp.all(jnp.isfinite(part))) for part in parts)
    if is_finite and not all(bool(jnp.all(jnp.isfinite(array))) for array in arrays):
        raise ValueError(
            f"{path}: the merged weight must fit in float16, got a value above 65504. "
            "Cast the tree to float32 or bfloat16 first."
        )


def merge_weight(weight: AdaptedWeight, **settings: Any) -> Any:
    """Return one adapted weight as a plain array in its own layout.

    The settings are passed to `reconstruct`.
    """
    base, factors, is_transposed = view_matrices(weight)
    dtype = jax.dtypes.canonicalize_dtype(weight.dtype)
    merged = reconstruct(factors, base, scale=weight.scale, dtype=dtype, **settings)

    def restore(matrix: Array) -> Any:
        if is_transposed:
            array = matrix.reshape(weight.shape)
        else:
            array = restore_layout(matrix, weight.layout, weight.shape)

        is_on_host = isinstance(weight.base, np.ndarray)
        if is_on_host and not isinstance(array, Tracer):
            return np.array(array, weight.dtype)
        return array

    return jax.tree.map(restore, merged)
