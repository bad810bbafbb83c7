"""Weights, inputs and building blocks of the functions that the tests lift."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.layouts import matrix_shape

# The layout and the shape of each weight. A function takes a weight by its name.
WEIGHTS = {
    "w": ("io", (6, 5)),
    "transposed": ("oi", (5, 6)),
    "square": ("io", (6, 6)),
    "other": ("io", (6, 6)),
    "heads": ("ioo", (6, 2, 4)),
    "joined": ("iio", (2, 4, 6)),
    "stack": ("io", (3, 6, 6)),
    "middle": ("ibo", (6, 3, 6)),
    "table": ("io", (11, 6)),
    "kernel": ("iiio", (3, 3, 6, 5)),
    "torch_kernel": ("oiii", (5, 6, 3, 3)),
}


def draw_normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


INPUTS = draw_normal(0, 4, 6)
HALF_INPUTS = INPUTS.astype(jnp.bfloat16)
IMAGE = draw_normal(1, 2, 5, 6, 6)
HEAD_INPUTS = draw_normal(2, 2, 4, 4)
GATES = draw_normal(3, 4, 3)
IDS = np.array([[1, 2, 10], [0, 5, 5]])
EXPERT = np.int32(2)


def adapt_weights_of(fn, change=None, **settings):
    """Return {name: AdaptedWeight} for the weights that fn takes; no factor is zero.

    change: A function from an AdaptedWeight to the fields to replace in it.
    """
    names = inspect.signature(fn).parameters
    adapted = {name: adapt_weight(name, **settings) for name in names}
    if change is None:
        return adapted
    return {name: dataclasses.replace(w, **change(w)) for name, w in adapted.items()}


def adapt_weight(name, rank=2, dtype=jnp.float32):
    layout, shape = WEIGHTS[name]
    *batch, m, n = matrix_shape(shape, layout)

    return jlora.AdaptedWeight(
        draw_normal(4, *shape).astype(dtype),
        draw_normal(5, *batch, m, rank),
        draw_normal(6, *batch, rank, n),
        jnp.float32(-0.5),
        "uv",
        None,
        jnp.dtype(dtype),
        None,
        layout,
        shape[-len(layout) :],
    )


@jax.custom_vjp
def odd_sine(x):
    """Return (sin x, x), with a wrong gradient that shows whether it is used."""
    return jnp.sin(x), x


odd_sine.defvjp(
    lambda x: (odd_sine(x), x), lambda x, g: (7 * g[0] * jnp.cos(x) + g[1],)
)


@jax.custom_jvp
def odd_twice(x):
    return 2 * odd_sine(x)[0]


odd_twice.defjvp(lambda x, t: (odd_twice(*x), 3 * t[0]))


def scan_tanh(step, stack, **settings):
    """Scan carry ← tanh(step(carry, weight)) over a stack of weights."""

    def body(carry, weight):
        return jnp.tanh(step(carry, weight)), jnp.sum(carry)

    return jax.lax.scan(body, INPUTS, stack, **settings)


def convolve(
    kernel, x=IMAGE, layout=("NHWC", "HWIO", "NHWC"), strides=(1, 1), **settings
):
    settings |= {"dimension_numbers": layout, "padding": "SAME"}
    return jax.lax.conv_general_dilated(x, kernel, strides, **settings)


def fill_lookup(table, ids):
    """Look up rows of a table; ids out of bounds give rows of threes."""
    return table.at[ids].get(mode="fill", fill_value=3.0)
