"""Functions of weights that `lift` must support: lookups, experts, convolutions.

Each parameter is the name of a weight in `lifted_inputs.WEIGHTS`.
"""

import jax
import jax.numpy as jnp

from tests.helpers.lifted_inputs import (
    EXPERT,
    GATES,
    IDS,
    IMAGE,
    INPUTS,
    convolve,
    draw_normal,
    fill_lookup,
)


def lookup_in_table(table):
    return jnp.take(table, IDS, axis=0), table.at[2 * IDS].get(mode="clip")


def lookup_with_fill_value(table):
    return fill_lookup(table, 2 * IDS)


def lookup_of_one_row(table):
    return table[-1] + 1.0, table[EXPERT] + 1.0


def lookup_of_one_row_in_vmap(table):
    return jax.vmap(lambda i: table[i])(IDS[0])


def lookup_along_outputs(w):
    return jnp.take(w, IDS % 5, axis=1), fill_lookup(w.T, IDS)


def lookup_in_stack(stack):
    return stack[1][IDS % 6], stack[EXPERT][IDS % 6]


def lookup_out_of_bounds(table):
    return jnp.nan_to_num(jnp.take(table, 2 * IDS, axis=0))


def tied_embeddings(table):
    return jnp.sin(table[IDS[0]]) @ table.T


def positions_added_to_activations(table):
    x = draw_normal(9, 2, 3, 6)
    return jnp.sin(x + table[None, :3]), jnp.sin(table[None, 2:5] - x), x[0] + table[8:]


LOOKUPS = (
    lookup_in_table,
    lookup_with_fill_value,
    lookup_of_one_row,
    lookup_of_one_row_in_vmap,
    lookup_along_outputs,
    lookup_in_stack,
    lookup_out_of_bounds,
    tied_embeddings,
    positions_added_to_activations,
)


def gated_experts(stack):
    return jnp.einsum("te,ti,eio->to", GATES, INPUTS, stack)


def experts_looked_up(stack):
    return jnp.einsum("ti,tio->to", INPUTS[:2], stack[IDS[:, 0]])


def experts_looked_up_in_vmap(stack):
    return jax.vmap(lambda x, i: x @ stack[i])(INPUTS[:2], IDS[:, 0])


def experts_out_of_bounds(stack):
    return jnp.einsum("ti,eio->teo", INPUTS, fill_lookup(stack, IDS[0]))


EXPERTS = (
    gated_experts,
    experts_looked_up,
    experts_looked_up_in_vmap,
    experts_out_of_bounds,
)


def convolution_with_strides(kernel):
    return convolve(kernel, strides=(2, 1))


def convolution_in_torch_layout(torch_kernel):
    layout = ("NCHW", "OIHW", "NCHW")
    image = IMAGE.transpose(0, 3, 1, 2)
    return convolve(torch_kernel, image, layout, rhs_dilation=(1, 2))


def convolution_with_transposed_kernel(kernel):
    return convolve(kernel.transpose(3, 2, 0, 1), IMAGE, ("NHWC", "OIHW", "NHWC"))


def convolution_in_groups(torch_kernel):
    layout = ("NCHW", "OIHW", "NCHW")
    image = jnp.concatenate([IMAGE, IMAGE + 1.0], -1).transpose(0, 3, 1, 2)
    return convolve(torch_kernel[:4], image, layout, feature_group_count=2)


def convolution_of_each_channel(kernel):
    image = IMAGE[..., :5]
    return convolve(kernel[:, :, :1], image, feature_group_count=5)


CONVOLUTIONS = (
    convolution_with_strides,
    convolution_in_torch_layout,
    convolution_with_transposed_kernel,
    convolution_in_groups,
    convolution_of_each_channel,
)
