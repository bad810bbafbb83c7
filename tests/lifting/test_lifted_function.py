"""`lift` against `on_merged`: thin factors against whole weights."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.lifted_functions import (
    DTYPES,
    LOOPS_AND_BRANCHES,
    PRODUCTS,
    TRANSFORMATIONS,
    jit_inside,
    products_with_heads,
    remat_inside,
    scan_checkpointed,
    scan_lookup_and_convolution,
)
from tests.helpers.lifted_inputs import (
    IDS,
    INPUTS,
    adapt_weight,
    adapt_weights_of,
    draw_normal,
)
from tests.helpers.lifted_lookups import (
    CONVOLUTIONS,
    EXPERTS,
    LOOKUPS,
    convolution_with_strides,
    gated_experts,
    tied_embeddings,
)
from tests.helpers.refused_functions import REFUSED

# Sums of at most a hundred products of float32 values, added in two orders, differ by
# about 1e-6.
CLOSE = 2e-5  # 100 eps of float32: three products and tanh, one after another

SUPPORTED = (
    *PRODUCTS,
    *LOOPS_AND_BRANCHES,
    *TRANSFORMATIONS,
    *LOOKUPS,
    *EXPERTS,
    *CONVOLUTIONS,
)

# Functions whose lifted programs are searched for products as large as a weight.
THIN = (
    products_with_heads,
    scan_checkpointed,
    gated_experts,
    jit_inside,
    tied_embeddings,
    convolution_with_strides,
)

# Other kinds of adapted weights: the fields to replace in an ordinary one.
CHANGES = {
    "core": lambda w: {"trainable": "core", "core": w.v[..., :2]},
    "s": lambda w: {"trainable": "s", "core": w.v[..., 0]},
    "no base": lambda w: {"base": None},
}


def name_of(case):
    return getattr(case, "__name__", None)


def assert_same(found, expected, tolerance=CLOSE):
    """Check each array up to a fraction of its largest entry."""

    def check(new, old):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        np.testing.assert_allclose(
            new, old, rtol=0, atol=tolerance * np.max(np.abs(old))
        )

    jax.tree.map(check, found, expected)


def differentiate(way, fn, adapted):
    """Return (result of fn, gradients of a loss on it to bases and factors)."""

    def loss(params):
        result = fn(**params)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(result)), result

    gradient = jax.jit(jax.grad(way(loss), has_aux=True))
    with jax.default_matmul_precision("highest"):
        gradients, result = gradient(adapted)

    # The gradient of the scale is left out: it is one sum over all entries, which
    # cancels, and it has no larger entry to measure its error by.
    return result, {name: (w.base, w.u, w.v, w.core) for name, w in gradients.items()}


def assert_lifts(fn, adapted, tolerance=CLOSE, lift=jlora.lift):
    expected = differentiate(jlora.on_merged, fn, adapted)
    assert_same(differentiate(lift, fn, adapted), expected, tolerance)


@pytest.mark.parametrize("fn", SUPPORTED, ids=name_of)
def test_lifted_function_has_the_value_and_gradients_of_the_merged_one(fn):
    assert_lifts(fn, adapt_weights_of(fn))


@pytest.mark.parametrize("kind", CHANGES)
def test_weights_with_a_core_or_without_a_base_are_lifted(kind):
    fn = scan_lookup_and_convolution
    assert_lifts(fn, adapt_weights_of(fn, CHANGES[kind]))


@pytest.mark.parametrize(("fn", "dtype"), DTYPES.items(), ids=name_of)
def test_dtypes_are_promoted_as_by_the_plain_function(fn, dtype):
    # A merged weight is rounded to its dtype, the factors are not. Both results are
    # rounded.
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    with jax.numpy_dtype_promotion("standard"):
        assert_lifts(fn, adapt_weights_of(fn, dtype=jnp.dtype(dtype)), tolerance)


def test_columns_before_the_trained_ones_have_no_gradient():
    adapted = adapt_weights_of(
        lambda w: w, lambda w: {"trainable": "v", "num_columns": 2}
    )
    found, expected = (
        differentiate(way, lambda w: INPUTS @ w, adapted)[1]["w"]
        for way in (jlora.lift, jlora.on_merged)
    )
    assert_same(found, (*expected[:2], expected[2].at[:, :-2].set(0), None))


def test_lifted_function_can_be_rematerialised_and_mapped_over_adapters():
    fn, weight = remat_inside, adapt_weight("stack")
    assert_lifts(
        fn, adapt_weights_of(fn), lift=lambda loss: jax.checkpoint(jlora.lift(loss))
    )

    axes = dataclasses.replace(weight, base=0, u=0, v=0, scale=None)
    mapped = jax.vmap(jlora.lift(jnp.matmul), in_axes=(None, axes))(INPUTS, weight)
    assert_same(mapped, INPUTS @ jlora.merge(weight))


def test_while_loop_takes_weights_in_its_carry_and_as_constants():
    def is_small(carry):
        return carry[0][0, 0] < 9

    def step(carry):
        return abs(carry[0]) + abs(carry[0] @ carry[1]) + 4, carry[1]

    def fn(square):
        constant = jax.lax.while_loop(
            is_small, lambda carry: (abs(carry[0] @ square) + 9,), (INPUTS,)
        )
        return constant, jax.lax.while_loop(is_small, step, (INPUTS, square))[0]

    # The same `step` at two ranks: a trace cached for one rank must not serve the
    # other.
    for rank in (2, 3):
        weight = adapt_weight("square", rank)
        assert_same(jlora.lift(fn)(weight), fn(jlora.merge(weight)))


@pytest.mark.parametrize("fn", THIN, ids=name_of)
def test_no_product_of_the_size_of_a_weight_is_formed(fn):
    adapted = adapt_weights_of(fn, rank=1)
    trainable, frozen = jlora.split_trainable(adapted)

    def sum_of_sines(params):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(**params)))

    def list_sizes(way):
        def loss(trainable):
            return way(sum_of_sines)(jlora.join(trainable, frozen))

        program = jax.jit(jax.grad(loss)).lower(trainable).as_text()
        shapes = re.findall(
            r"(?:dot_general|multiply) .* tensor<([\dx]+)xf32>\n", program
        )
        return {np.prod(np.array(shape.split("x"), int)) for shape in shapes}

    weights = adapted.values()
    whole = {w.base.size for w in weights}
    whole |= {w.u.shape[-2] * w.v.shape[-1] for w in weights}
    assert whole & list_sizes(jlora.on_merged)
    assert not whole & list_sizes(jlora.lift)


@pytest.mark.parametrize(("fn", "operation"), REFUSED.items(), ids=name_of)
def test_function_that_needs_the_whole_weight_is_refused_or_materialises_it(
    fn, operation
):
    adapted = adapt_weights_of(fn)
    with pytest.raises(
        ValueError, match=f"^({'|'.join(adapted)}): `fn` must use .*{operation}"
    ):
        jlora.lift(lambda params: fn(**params))(adapted)
    assert_lifts(fn, adapted, lift=lambda loss: jlora.lift(loss, materialize=True))


def test_a_wrong_layout_is_named_where_it_shows():
    # Haiku stores a transposed convolution as [window, outputs, inputs].
    kernel = draw_normal(3, 3, 6, 5)
    params = {"w": kernel}
    plan = jlora.make_plan(params, jlora.Rule("w", 2, layout="ioi"))
    adapted = jlora.adapt(params, plan, key=jax.random.key(0))

    def model(params):
        layout = ("NWC", "WIO", "NWC")
        x = draw_normal(1, 2, 4, 6)
        return jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=layout
        )

    with pytest.raises(
        ValueError, match=r"layout 'ioi'\. Check the layout in its rule"
    ):
        jlora.lift(model)(adapted)


def test_one_trace_serves_all_values_of_the_factors():
    shapes, weight = [], adapt_weight("w")

    def multiply(w):
        shapes.append(w.shape)
        return INPUTS @ w

    run = jax.jit(jlora.lift(multiply))
    other = dataclasses.replace(weight, v=weight.v + 1)
    assert not np.allclose(run(weight), run(other))
    assert shapes == [(6, 5)]


def test_arguments_of_every_kind_reach_the_function():
    def fn(w, x, bias=None, *, table, power, activation, key):
        noise = jax.random.normal(key, x.shape, jnp.float32)
        return bias, activation((x + noise) @ w) ** power, table[IDS]

    settings = {"power": 2, "activation": jnp.tanh, "key": jax.random.key(9)}
    w, table = adapt_weight("w"), adapt_weight("table")
    found = jlora.lift(fn)(w, np.asarray(INPUTS), table=table, **settings)
    expected = fn(jlora.merge(w), INPUTS, table=jlora.merge(table), **settings)
    assert_same(found, expected)

    # Errors name the argument by its position or its name.
    for path, args, kwargs in [
        ("argument 1", (INPUTS, w), {}),
        ("w", (INPUTS,), {"w": w}),
    ]:
        with pytest.raises(ValueError, match=f"{path}: `fn` must"):
            jlora.lift(lambda x, w: x @ jnp.abs(w))(*args, **kwargs)


def test_without_quax_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {"numpy": "found"}.get)
    with pytest.raises(ImportError, match=r"`lift` must have quax.*jlora\[lift\]"):
        jlora.lift(jnp.sin)


def test_importing_jlora_loads_none_of_the_extras():
    code = "import jlora, sys; print({'quax', 'equinox', 'flax'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
