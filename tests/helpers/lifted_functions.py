"""Functions of weights that `lift` must support: products, loops, transformations.

Each parameter is the name of a weight in `lifted_inputs.WEIGHTS`.
"""

import jax
import jax.numpy as jnp

from tests.helpers.lifted_inputs import (
    EXPERT,
    HALF_INPUTS,
    HEAD_INPUTS,
    IDS,
    IMAGE,
    INPUTS,
    convolve,
    draw_normal,
    fill_lookup,
    odd_sine,
    odd_twice,
    scan_tanh,
)


def products_from_both_sides(w, transposed):
    return (
        INPUTS @ w,
        INPUTS @ transposed.T,
        w.T @ INPUTS.T,
        transposed @ INPUTS.T,
        INPUTS[0] @ w,
    )


def products_with_heads(heads, joined):
    return (
        jnp.einsum("ti,iha->hta", INPUTS, heads),
        jnp.einsum("hta,iha->ti", HEAD_INPUTS, heads),
        jnp.tensordot(HEAD_INPUTS.transpose(1, 0, 2), joined, 2),
    )


def product_with_batch_axes(heads):
    return jnp.einsum("hta,iha->thi", HEAD_INPUTS, heads)


def product_that_contracts_all_axes(w):
    return jnp.einsum("tio,io->t", draw_normal(8, 4, 6, 5), w)


def product_that_contracts_no_axis(w):
    return jnp.einsum("t,io->tio", INPUTS[0], w)


def product_after_reshape_and_split(heads):
    matrix = heads.reshape(2, 3, 8).reshape(6, 8)
    return INPUTS @ jnp.split(matrix, 2, 1)[1]


def products_with_slices(w, heads):
    return (
        INPUTS @ w[:, 1:4:2],
        INPUTS[:, :2] @ w[::3],
        INPUTS @ heads[:, 1],
        INPUTS[:, :2] @ jax.lax.dynamic_slice_in_dim(w, EXPERT, 2),
    )


def product_with_added_and_squeezed_axes(w):
    return jnp.squeeze(INPUTS[:, None] @ w[None], 1)


def product_with_scaled_weight(w):
    return INPUTS @ (-(w * 2.0) / 3.0)


def product_without_gradient(w):
    return INPUTS @ jax.lax.stop_gradient(w)


def products_with_scaled_rows_and_columns(w, stack):
    numbers = draw_normal(7, 6)
    return (
        INPUTS @ (w * numbers[:, None]),
        INPUTS @ (w / (1.0 + abs(numbers[None, :5]))),
        INPUTS @ (numbers[:3, None, None] * stack),
    )


def products_with_weight_in_another_order(w, stack):
    return INPUTS @ w[:, ::-1], [INPUTS @ matrix for matrix in jnp.unstack(stack)]


def products_with_added_arrays(w):
    other = draw_normal(8, 6, 5)
    return INPUTS @ (w + 0), INPUTS @ (other - w), INPUTS @ (w - other)


def products_behind_a_barrier(square, other):
    first, second, x = jax.lax.optimization_barrier((square, other, INPUTS))
    return x @ first @ second


def products_in_groups(stack):
    sizes = jnp.array([1, 0, 3], jnp.int32)
    return jax.lax.ragged_dot(INPUTS, stack, sizes), jax.lax.ragged_dot(
        INPUTS, stack.transpose(0, 2, 1), sizes
    )


PRODUCTS = (
    products_from_both_sides,
    products_with_heads,
    product_with_batch_axes,
    product_that_contracts_all_axes,
    product_that_contracts_no_axis,
    product_after_reshape_and_split,
    products_with_slices,
    product_with_added_and_squeezed_axes,
    product_with_scaled_weight,
    product_without_gradient,
    products_with_scaled_rows_and_columns,
    products_with_weight_in_another_order,
    products_with_added_arrays,
    products_behind_a_barrier,
    products_in_groups,
)


def scan_over_stack(stack):
    return scan_tanh(jnp.matmul, stack)


def scan_reversed_and_unrolled(stack):
    return scan_tanh(jnp.matmul, stack, reverse=True, unroll=2)


def scan_checkpointed(stack):
    return scan_tanh(jax.checkpoint(jnp.matmul), stack)


def scan_over_transposed_stack(stack):
    return scan_tanh(jnp.matmul, stack.transpose(0, 2, 1))


def scan_over_middle_axis(middle):
    return scan_tanh(jnp.matmul, jnp.moveaxis(middle, 1, 0))


def scan_with_constant_weight(square, stack):
    return scan_tanh(lambda carry, w: carry @ square @ w, stack[1:])


def scan_that_returns_weights(stack):
    return INPUTS @ jax.lax.map(lambda w: w.T, stack)[1]


def fori_loop_over_stack(stack):
    return jax.lax.fori_loop(0, 3, lambda i, carry: jnp.tanh(carry @ stack[i]), INPUTS)


def cond_and_switch(square, other):
    is_positive = INPUTS[0, 0] > 0
    branches = [lambda: INPUTS @ square, lambda: INPUTS, lambda: INPUTS @ other.T]

    return (
        jax.lax.cond(
            is_positive, lambda w: INPUTS @ w, lambda w: 2 * (INPUTS @ w.T), square
        ),
        jax.lax.switch(EXPERT, branches),
    )


LOOPS_AND_BRANCHES = (
    scan_over_stack,
    scan_reversed_and_unrolled,
    scan_checkpointed,
    scan_over_transposed_stack,
    scan_over_middle_axis,
    scan_with_constant_weight,
    scan_that_returns_weights,
    fori_loop_over_stack,
    cond_and_switch,
)


def jit_inside(square):
    return jax.jit(lambda w: (jnp.sin(INPUTS @ w), w))(square)[0] @ square


def remat_inside(square):
    return jax.checkpoint(lambda w: jnp.sin(INPUTS @ w) @ w.T)(square)


def remat_with_policy(square):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda x: jnp.sin(x @ square), policy=policy)(INPUTS)


def vmap_over_inputs_and_weights(w, stack):
    return (
        jax.vmap(lambda row: row @ w)(INPUTS),
        jax.vmap(lambda weight: INPUTS @ weight)(stack),
    )


def grad_inside(square):
    return jax.grad(lambda x: jnp.sum(jnp.sin(x @ square) @ square.T))(INPUTS)


def custom_jvp_of_result(w):
    return jax.nn.relu(INPUTS @ w)


def custom_vjp_of_result(w):
    return odd_sine(INPUTS @ w)


def custom_vjp_in_jit_and_remat(w):
    return jax.jit(jax.checkpoint(lambda w: odd_sine(INPUTS @ w)))(w)


def custom_vjp_in_jit_and_in_map(w):
    return jax.jit(odd_sine)(INPUTS @ w), jax.lax.map(odd_sine, INPUTS @ w)


def custom_vjp_in_custom_jvp(w):
    return odd_twice(INPUTS @ w)


def custom_vjp_in_scan(stack):
    return scan_tanh(lambda carry, w: odd_sine(carry @ w)[0], stack)


def custom_vjp_in_vmap_and_cond(square):
    def choose(row):
        return jax.lax.cond(
            INPUTS[0, 0] > 0, lambda: odd_sine(row @ square)[0], lambda: row
        )

    return jax.vmap(choose)(INPUTS)


TRANSFORMATIONS = (
    jit_inside,
    remat_inside,
    remat_with_policy,
    vmap_over_inputs_and_weights,
    grad_inside,
    custom_jvp_of_result,
    custom_vjp_of_result,
    custom_vjp_in_jit_and_remat,
    custom_vjp_in_jit_and_in_map,
    custom_vjp_in_custom_jvp,
    custom_vjp_in_scan,
    custom_vjp_in_vmap_and_cond,
)


def scan_lookup_and_convolution(stack, table, kernel):
    """Use each kind of operation once, for weights with unusual fields."""
    return scan_over_stack(stack), fill_lookup(table, 2 * IDS), convolve(kernel)


def bfloat16_weights(w, table):
    return (
        INPUTS @ w,
        table[IDS],
        jnp.matmul(HALF_INPUTS, w, preferred_element_type=jnp.float32),
    )


def bfloat16_experts(stack):
    x = HALF_INPUTS
    return (
        jnp.einsum("ti,eio->teo", x, stack),
        jnp.einsum("ti,eio->eto", x, stack),
        jnp.einsum("tei,eio->teo", jnp.stack([x, x, x], 1), stack),
        jax.lax.ragged_dot(x, stack, jnp.array([1, 0, 3], jnp.int32)),
    )


def float32_weights(w):
    return (
        HALF_INPUTS @ w,
        HALF_INPUTS @ w.astype(jnp.bfloat16),
        INPUTS @ w.astype(jnp.float16),
    )


def float16_weights(kernel):
    return convolve(kernel, IMAGE.astype(jnp.float16))


# The dtype of the weights of each function.
DTYPES = {
    bfloat16_weights: "bfloat16",
    bfloat16_experts: "bfloat16",
    float32_weights: "float32",
    float16_weights: "float16",
}
