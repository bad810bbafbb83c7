"""Lifted functions on quantised bases, against the same bases dequantised."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quantization import QuantizedArray, fp8, int4, int8, nf4, quantize
from tests.helpers.lifted_functions import (
    LOOPS_AND_BRANCHES,
    PRODUCTS,
    TRANSFORMATIONS,
)
from tests.helpers.lifted_inputs import adapt_weights_of
from tests.helpers.lifted_lookups import CONVOLUTIONS, EXPERTS, LOOKUPS

# Sums of at most a hundred products of float32 values, added in two orders.
CLOSE = 2e-5
FUNCTIONS = (
    *PRODUCTS,
    *LOOPS_AND_BRANCHES,
    *TRANSFORMATIONS,
    *LOOKUPS,
    *EXPERTS,
    *CONVOLUTIONS,
)
FORMATS = [nf4(block_size=4), nf4(block_size=4, double_quant=False), int8(), fp8()]


def differentiate(fn, adapted):
    """Return (result, gradients of u and v) of a loss on a lifted function."""
    factors = {name: (w.u, w.v) for name, w in adapted.items()}

    def loss(factors):
        weights = {
            name: dataclasses.replace(adapted[name], u=u, v=v)
            for name, (u, v) in factors.items()
        }
        result = jlora.lift(fn)(**weights)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(result)), result

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(loss, has_aux=True))(factors)


def assert_same(found, expected):
    def check(new, old):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        np.testing.assert_allclose(new, old, rtol=0, atol=CLOSE * np.max(np.abs(old)))

    jax.tree.map(check, found, expected)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_values_and_gradients_are_of_the_dequantised_base(fn):
    # Each function meets one of the formats.
    format = FORMATS[FUNCTIONS.index(fn) % len(FORMATS)]

    def change(w):
        return {"base": quantize(w.base, format, layout=w.layout)}

    adapted = adapt_weights_of(fn, change)
    plain = adapt_weights_of(fn, lambda w: {"base": change(w)["base"].dequantize()})
    assert_same(differentiate(fn, adapted), differentiate(fn, plain))


@pytest.mark.parametrize("format", [*FORMATS, int4()], ids=lambda f: f.label)
@pytest.mark.parametrize("layout", ["io", "oi"])
def test_a_lookup_dequantises_only_the_rows_asked_for(format, layout):
    size, width = 4096, 512
    rng = np.random.default_rng(0)
    shape = (size, width)
    table = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rule = jlora.Rule("t", 2, init="lora", layout=layout, quantize=format)
    plan = jlora.make_plan({"t": table}, rule)
    adapted = jlora.adapt({"t": table}, plan, key=jax.random.key(0))
    ids = jnp.array([[0, 1, 4095], [7, 64, 65]])

    run = jax.jit(jlora.lift(lambda params, ids: jnp.take(params["t"], ids, 0)))
    found = run(adapted, ids)
    # A nested scale is a product and a sum, which XLA may round once or twice.
    expected = adapted["t"].base.dequantize()[ids]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Out of range: NaN, as in a plain table.
    outside = run(adapted, jnp.array([[4096, 0, 1]]))
    assert np.isnan(outside[0, 0]).all()
    assert np.isfinite(outside[0, 1:]).all()

    compiled = run.lower(adapted, ids).compile()
    assert not re.search(rf"f32\[({size},{width}|{width},{size})\]", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < size * width


@pytest.mark.parametrize("format", [nf4(), int8(block_size=32)], ids=lambda f: f.label)
def test_slices_of_outputs_and_matrices_stay_quantised(format):
    """Fused projections and stacks of experts: no float copy of the weight."""
    size = 256
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.standard_normal((3, size, 3 * size)), jnp.float32)
    plan = jlora.make_plan({"w": stack}, jlora.Rule("w", 2, quantize=format))
    adapted = jlora.adapt({"w": stack}, plan, key=jax.random.key(0))
    x = jnp.asarray(rng.standard_normal((4, size)), jnp.float32)

    def fn(params, x, expert):
        w = params["w"][expert]
        query, key, value = jnp.split(params["w"][1], 3, axis=-1)
        return x @ w, x @ query + (x @ key) * (x @ value)

    run = jax.jit(jlora.lift(fn))
    found = run(adapted, x, 2)
    merged = jlora.merge(adapted)
    for new, old in zip(found, fn(merged, x, 2), strict=True):
        # Products of sums of 256 numbers in another order.
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-2)
    text = run.lower(adapted, x, 2).compile().as_text()
    assert not re.search(rf"f32\[(\d,)?({size},{3 * size}|{3 * size},{size})\]", text)


def test_a_slice_of_inputs_is_dequantised():
    base = quantize(jnp.ones((64, 8), jnp.float32), int8())
    adapted = jlora.adapt(
        {"w": base},
        jlora.make_plan({"w": base}, jlora.Rule("w", 2, init="lora")),
        key=jax.random.key(0),
    )
    assert isinstance(adapted["w"].base, QuantizedArray)
    found = jlora.lift(lambda p: jnp.ones((2, 5), jnp.float32) @ p["w"][3:8])(adapted)
    np.testing.assert_allclose(found, np.full((2, 8), 5.0), rtol=1e-6)
