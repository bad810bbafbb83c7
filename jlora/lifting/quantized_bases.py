"""Products of a lifted weight whose base is quantised."""

from collections.abc import Sequence

import jax.numpy as jnp

from jlora._types import Array
from jlora.factors import Factors
from jlora.layouts import list_axes
from jlora.lifting.lifted_weight import LiftedWeight
from jlora.quantization.quantized_array import QuantizedArray
from jlora.reconstruction.quantized_products import apply_quantized

# Axes of the left operand, and of the right one.
AxesOfBoth = tuple[Sequence[int], Sequence[int]]


def multiply_quantized(
    w: LiftedWeight,
    x: Array,
    dimension_numbers: tuple[AxesOfBoth, AxesOfBoth],
    is_left: bool,
) -> Array | None:
    """Return the product of a weight and an array, dequantising a block at a time.

    None: the base is no `QuantizedArray`, or the product sums over other axes than all
    inputs, or all outputs, of each matrix, so that it needs the whole array.

    Args:
        w: the weight.
        x: the array.
        dimension_numbers: (contracting, batch) axes of the left and the right operand.
        is_left: whether the weight is the left operand.
    """
    base, layout = w.base, w.layout
    if not isinstance(base, QuantizedArray):
        return None
    order = (0, 1) if is_left else (1, 0)
    (w_summed, x_summed), (w_batch, x_batch) = (
        [list(axes[side]) for side in order] for axes in dimension_numbers
    )
    inputs, outputs = (list_axes(layout, letter) for letter in "io")
    if w_batch != list_axes(layout, "b"):
        return None
    if sorted(w_summed) not in (inputs, outputs):
        return None

    # Bring x to [*batch, *free, *summed], the summed axes in the order of the base.
    is_transposed = sorted(w_summed) == outputs
    kept = inputs if is_transposed else outputs
    summed = [x_summed[w_summed.index(axis)] for axis in sorted(w_summed)]
    free = [axis for axis in range(x.ndim) if axis not in (*x_batch, *x_summed)]
    moved = x.transpose([*x_batch, *free, *summed])
    batch_shape = moved.shape[: len(x_batch)]
    free_shape = moved.shape[len(x_batch) : len(x_batch) + len(free)]
    num_summed = base.num_outputs if is_transposed else base.num_inputs
    rows = moved.reshape(*batch_shape, -1, num_summed)

    factors = _view_factors(w, is_transposed=is_transposed)
    y = apply_quantized(rows, base, factors, is_transposed=is_transposed)
    kept_shape = [base.shape[axis] for axis in kept]
    y = y.reshape(*batch_shape, *free_shape, *kept_shape)
    if not is_left:
        return y

    # The axes of the left operand come first.
    first, last = len(x_batch), len(x_batch) + len(free)
    order = [*range(first), *range(last, y.ndim), *range(first, last)]
    return jnp.transpose(y, order)


def _view_factors(w: LiftedWeight, *, is_transposed: bool) -> Factors:
    """Return the factors as matrices [..., m, r] and [..., r, n], or transposed."""
    num_batch = w.layout.count("b")
    batch, rank = w.u.shape[:num_batch], w.u.shape[-1]
    u = w.u.reshape(*batch, -1, rank)
    v = w.v.reshape(*batch, rank, -1)
    return Factors(v.mT, u.mT) if is_transposed else Factors(u, v)
