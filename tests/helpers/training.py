"""A small problem to train on."""

import jax
import jax.numpy as jnp

import jlora

KEY = jax.random.key(0)


def make_problem(rule=None):
    """Return (adapted, batch): a weight, and outputs of a slightly different weight."""
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "w": jax.random.normal(keys[0], (10, 6), jnp.float32),
        "bias": jnp.zeros(6, jnp.float32),
    }
    x = jax.random.normal(keys[1], (32, 10), jnp.float32)
    y = x @ (params["w"] + 0.3 * jax.random.normal(keys[2], (10, 6), jnp.float32))
    plan = jlora.make_plan(params, rule or jlora.Rule("w", 6))
    return jlora.adapt(params, plan, key=KEY), (x, y)


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((jlora.linear(x, params["w"]) + params["bias"][None] - y) ** 2)
