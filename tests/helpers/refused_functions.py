"""Functions of weights that `lift` refuses, since they need the whole weight.

Each parameter is the name of a weight in `lifted_inputs.WEIGHTS`.
"""

import jax
import jax.numpy as jnp

from tests.helpers.lifted_inputs import INPUTS, convolve, draw_normal, odd_sine


def sum_of_weight(w):
    return jnp.sum(w)


def square_of_weight(w):
    return INPUTS @ w**2


def reshape_across_inputs_and_outputs(heads):
    return heads.reshape(12, 4)


def weight_as_result(w):
    return w.T


def custom_vjp_of_weight(w):
    return odd_sine(w)


def convolution_in_groups_of_images(kernel):
    return convolve(kernel[..., :4], batch_group_count=2)


def weight_scaled_entry_by_entry(w):
    return INPUTS @ (w * draw_normal(8, 6, 5))


def scan_over_rows_of_weight(w):
    return jax.lax.scan(lambda carry, row: (carry * row, carry), INPUTS[0, :5], w)


def weight_in_carry_of_scan(stack):
    gram = INPUTS.T @ INPUTS
    return jax.lax.scan(lambda carry, w: (w, INPUTS @ carry), gram, stack)


def while_loop_that_exchanges_weights(square, other):
    def is_small(carry):
        return carry[0][0, 0] < 9

    def step(carry):
        return abs(INPUTS @ carry[1]) + 9, jax.lax.stop_gradient(other)

    initial = jax.lax.stop_gradient((INPUTS, square))
    return jax.lax.while_loop(is_small, step, initial)[0]


def cond_that_returns_weights(square, other):
    is_positive = INPUTS[0, 0] > 0
    return INPUTS @ jax.lax.cond(is_positive, lambda: square, lambda: other)


# The operation that the error message names for each function.
REFUSED = {
    sum_of_weight: "`reduce_sum`",
    square_of_weight: "`integer_pow`",
    reshape_across_inputs_and_outputs: "`reshape` of inputs with outputs",
    weight_as_result: "a result that is the weight itself",
    custom_vjp_of_weight: "`custom_vjp`",
    convolution_in_groups_of_images: "`conv_general_dilated`",
    weight_scaled_entry_by_entry: "`mul`",
    scan_over_rows_of_weight: "`scan` over its inputs",
    weight_in_carry_of_scan: "the carry of `scan`",
    while_loop_that_exchanges_weights: "`while`",
    cond_that_returns_weights: "`cond`",
}
