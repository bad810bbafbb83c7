"""`lift` against `on_merged`: one function, with thin factors and with whole weights."""

import dataclasses
import inspect
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.layouts import matrix_shape

# Sums of at most a hundred products of float32 numbers, taken in two orders: some 1e-6.
CLOSE = 1e-5
WEIGHTS = {
    "w": ("io", (6, 5)),
    "turned": ("oi", (5, 6)),
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


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, IMAGE, HEADS, GATES = (
    normal(0, 4, 6),
    normal(1, 2, 5, 6, 6),
    normal(2, 2, 4, 4),
    normal(3, 4, 3),
)
IDS, EXPERT, SHORT = (
    np.array([[1, 2, 10], [0, 5, 5]]),
    np.int32(2),
    X.astype(jnp.bfloat16),
)


def adapt(fn, change=lambda w: {}, **settings):
    """Return {name: AdaptedWeight} of the weights that fn names, none of their factors zero."""
    weights = {
        name: adapt_one(name, **settings) for name in inspect.signature(fn).parameters
    }
    return {name: dataclasses.replace(w, **change(w)) for name, w in weights.items()}


def adapt_one(name, rank=2, dtype=jnp.float32):
    layout, shape = WEIGHTS[name]
    *batch, m, n = matrix_shape(shape, layout)
    return jlora.AdaptedWeight(
        normal(4, *shape).astype(dtype),
        normal(5, *batch, m, rank),
        normal(6, *batch, rank, n),
        jnp.float32(-0.5),
        "uv",
        None,
        jnp.dtype(dtype),
        None,
        layout,
        shape[-len(layout) :],
    )


def assert_same(found, expected, tolerance=CLOSE):
    """Each entry agrees to a fraction of the largest one of its array."""

    def check(new, old):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        np.testing.assert_allclose(
            new, old, rtol=0, atol=tolerance * np.max(np.abs(old))
        )

    jax.tree.map(check, found, expected)


def differentiate(way, fn, adapted):
    """Return (the result of fn, the gradients to the bases and factors of a loss on it)."""

    def loss(params):
        result = fn(**params)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(result)), result

    gradient = jax.jit(jax.grad(way(loss), has_aux=True))
    with jax.default_matmul_precision("highest"):
        gradients, result = gradient(adapted)
    # The scale's is one sum over everything, which cancels: it has no largest entry.
    return result, {name: (w.base, w.u, w.v, w.core) for name, w in gradients.items()}


def assert_lifts(fn, adapted, tolerance=CLOSE, lift=jlora.lift):
    expected = differentiate(jlora.on_merged, fn, adapted)
    assert_same(differentiate(lift, fn, adapted), expected, tolerance)


@jax.custom_vjp
def odd_sine(x):
    """A sine with a gradient that is wrong on purpose: only then can it be seen to be used."""
    return jnp.sin(x), x


odd_sine.defvjp(
    lambda x: (odd_sine(x), x), lambda x, g: (7 * g[0] * jnp.cos(x) + g[1],)
)


@jax.custom_jvp
def odd_twice(x):
    return 2 * odd_sine(x)[0]


odd_twice.defjvp(lambda x, t: (odd_twice(*x), 3 * t[0]))


def scan(step, stack, **settings):
    return jax.lax.scan(
        lambda c, w: (jnp.tanh(step(c, w)), jnp.sum(c)), X, stack, **settings
    )


def convolve(
    kernel, x=IMAGE, layout=("NHWC", "HWIO", "NHWC"), strides=(1, 1), **settings
):
    settings |= {"dimension_numbers": layout, "padding": "SAME"}
    return jax.lax.conv_general_dilated(x, kernel, strides, **settings)


def fill(table, ids):
    return table.at[ids].get(mode="fill", fill_value=3.0)


CASES = {
    "x @ w": lambda w, turned: (X @ w, X @ turned.T, w.T @ X.T, turned @ X.T, X[0] @ w),
    "heads": lambda heads, joined: (
        jnp.einsum("ti,iha->hta", X, heads),
        jnp.einsum("hta,iha->ti", HEADS, heads),
        jnp.tensordot(HEADS.transpose(1, 0, 2), joined, 2),
    ),
    "batch axes": lambda heads: jnp.einsum("hta,iha->thi", HEADS, heads),
    "all contracted": lambda w: jnp.einsum("tio,io->t", normal(8, 4, 6, 5), w),
    "none contracted": lambda w: jnp.einsum("t,io->tio", X[0], w),
    "reshape, split": lambda heads: (
        X @ jnp.split(heads.reshape(2, 3, 8).reshape(6, 8), 2, 1)[1]
    ),
    "slices": lambda w, heads: (
        X @ w[:, 1:4:2],
        X[:, :2] @ w[::3],
        X @ heads[:, 1],
        X[:, :2] @ jax.lax.dynamic_slice_in_dim(w, EXPERT, 2),
    ),
    "squeeze, expand_dims": lambda w: jnp.squeeze(X[:, None] @ w[None], 1),
    "scalars": lambda w: X @ (-(w * 2.0) / 3.0),
    "stop": lambda w: X @ jax.lax.stop_gradient(w),
    "scan": lambda stack: scan(jnp.matmul, stack),
    "filled": lambda table: fill(table, 2 * IDS),
    "scan reversed, unrolled": lambda stack: scan(
        jnp.matmul, stack, reverse=True, unroll=2
    ),
    "scan checkpointed": lambda stack: scan(jax.checkpoint(jnp.matmul), stack),
    "scan of a transposed stack": lambda stack: scan(
        jnp.matmul, stack.transpose(0, 2, 1)
    ),
    "scan over a middle axis": lambda middle: scan(
        jnp.matmul, jnp.moveaxis(middle, 1, 0)
    ),
    "scan with a constant": lambda square, stack: scan(
        lambda c, w: c @ square @ w, stack[1:]
    ),
    "scan giving weights back": lambda stack: X @ jax.lax.map(lambda w: w.T, stack)[1],
    "fori_loop": lambda stack: jax.lax.fori_loop(
        0, 3, lambda i, c: jnp.tanh(c @ stack[i]), X
    ),
    "cond, switch": lambda square, other: (
        jax.lax.cond(X[0, 0] > 0, lambda w: X @ w, lambda w: 2 * (X @ w.T), square),
        jax.lax.switch(EXPERT, [lambda: X @ square, lambda: X, lambda: X @ other.T]),
    ),
    "jit": lambda square: jax.jit(lambda w: (jnp.sin(X @ w), w))(square)[0] @ square,
    "remat": lambda square: jax.checkpoint(lambda w: jnp.sin(X @ w) @ w.T)(square),
    "remat with a policy": lambda square: jax.checkpoint(
        lambda x: jnp.sin(x @ square), policy=jax.checkpoint_policies.dots_saveable
    )(X),
    "vmap": lambda w, stack: (
        jax.vmap(lambda row: row @ w)(X),
        jax.vmap(lambda w: X @ w)(stack),
    ),
    "grad inside": lambda square: jax.grad(
        lambda x: jnp.sum(jnp.sin(x @ square) @ square.T)
    )(X),
    "custom_jvp": lambda w: jax.nn.relu(X @ w),
    "custom_vjp": lambda w: odd_sine(X @ w),
    "custom_vjp in jit, remat": lambda w: jax.jit(
        jax.checkpoint(lambda w: odd_sine(X @ w))
    )(w),
    "custom_vjp apart": lambda w: (
        jax.jit(odd_sine)(X @ w),
        jax.lax.map(odd_sine, X @ w),
    ),
    "custom_vjp in custom_jvp": lambda w: odd_twice(X @ w),
    "custom_vjp in scan": lambda stack: scan(lambda c, w: odd_sine(c @ w)[0], stack),
    "custom_vjp in vmap, cond": lambda square: jax.vmap(
        lambda row: jax.lax.cond(
            X[0, 0] > 0, lambda: odd_sine(row @ square)[0], lambda: row
        )
    )(X),
    "lookup": lambda table: (
        jnp.take(table, IDS, axis=0),
        table.at[2 * IDS].get(mode="clip"),
    ),
    "lookup of one row": lambda table: (table[-1] + 1.0, table[EXPERT] + 1.0),
    "lookup of one row in vmap": lambda table: jax.vmap(lambda i: table[i])(IDS[0]),
    "lookup along outputs": lambda w: (jnp.take(w, IDS % 5, axis=1), fill(w.T, IDS)),
    "lookup in a stack": lambda stack: (stack[1][IDS % 6], stack[EXPERT][IDS % 6]),
    "lookup out of bounds": lambda table: jnp.nan_to_num(
        jnp.take(table, 2 * IDS, axis=0)
    ),
    "tied embeddings": lambda table: jnp.sin(table[IDS[0]]) @ table.T,
    "experts": lambda stack: jnp.einsum("te,ti,eio->to", GATES, X, stack),
    "experts looked up": lambda stack: jnp.einsum(
        "ti,tio->to", X[:2], stack[IDS[:, 0]]
    ),
    "experts in vmap": lambda stack: jax.vmap(lambda x, i: x @ stack[i])(
        X[:2], IDS[:, 0]
    ),
    "experts out of bounds": lambda stack: jnp.einsum(
        "ti,eio->teo", X, fill(stack, IDS[0])
    ),
    "convolution": lambda kernel: convolve(kernel, strides=(2, 1)),
    "convolution of torch": lambda torch_kernel: convolve(
        torch_kernel,
        IMAGE.transpose(0, 3, 1, 2),
        ("NCHW", "OIHW", "NCHW"),
        rhs_dilation=(1, 2),
    ),
    "convolution, kernel turned": lambda kernel: convolve(
        kernel.transpose(3, 2, 0, 1), IMAGE, ("NHWC", "OIHW", "NHWC")
    ),
}
CHANGES = {
    "core": lambda w: {"trainable": "core", "core": w.v[..., :2]},
    "s": lambda w: {"trainable": "s", "core": w.v[..., 0]},
    "no base": lambda w: {"base": None},
}
CASES |= dict.fromkeys(
    CHANGES,
    lambda stack, table, kernel: (
        scan(jnp.matmul, stack),
        fill(table, 2 * IDS),
        convolve(kernel),
    ),
)
DTYPES = {
    "bfloat16": lambda w, table: (
        X @ w,
        table[IDS],
        jnp.matmul(SHORT, w, preferred_element_type=jnp.float32),
    ),
    "float32": lambda w: (
        SHORT @ w,
        SHORT @ w.astype(jnp.bfloat16),
        X @ w.astype(jnp.float16),
    ),
    "float16": lambda kernel: convolve(kernel, IMAGE.astype(jnp.float16)),
}
THIN = [
    "heads",
    "scan checkpointed",
    "experts",
    "jit",
    "tied embeddings",
    "convolution",
]
REFUSED = {
    "`reduce_sum`": lambda w: jnp.sum(w),
    "`integer_pow`": lambda w: X @ w**2,
    "`reshape` of inputs with outputs": lambda heads: heads.reshape(12, 4),
    "a result that is the weight itself": lambda w: w.T,
    "`custom_vjp`": lambda w: odd_sine(w),
    "`conv_general_dilated`": lambda kernel: convolve(
        kernel[:, :, :3, :4], feature_group_count=2
    ),
    "`scan` over its inputs": lambda w: jax.lax.scan(
        lambda c, row: (c * row, c), X[0, :5], w
    ),
    "the carry of `scan`": lambda stack: jax.lax.scan(
        lambda c, w: (w, X @ c), X.T @ X, stack
    ),
    "`while`": lambda square, other: jax.lax.while_loop(
        lambda c: c[0][0, 0] < 9,
        lambda c: (abs(X @ c[1]) + 9, jax.lax.stop_gradient(other)),
        jax.lax.stop_gradient((X, square)),
    )[0],
    "`cond`": lambda square, other: (
        X @ jax.lax.cond(X[0, 0] > 0, lambda: square, lambda: other)
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lifted_function_has_the_value_and_gradients_of_the_merged_one(case):
    assert_lifts(CASES[case], adapt(CASES[case], CHANGES.get(case, lambda w: {})))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_promoted_as_by_the_plain_function(dtype):
    # A merged weight is rounded and the factors are not; a result is rounded in both.
    tolerance = 4 * float(jnp.finfo(jnp.bfloat16).eps)
    with jax.numpy_dtype_promotion("standard"):
        assert_lifts(
            DTYPES[dtype], adapt(DTYPES[dtype], dtype=jnp.dtype(dtype)), tolerance
        )


def test_columns_before_the_trained_ones_have_no_gradient():
    adapted = adapt(lambda w: w, lambda w: {"trainable": "v", "num_columns": 2})
    ways = jlora.lift, jlora.on_merged
    found, expected = (
        differentiate(way, lambda w: X @ w, adapted)[1]["w"] for way in ways
    )
    assert_same(found, (*expected[:2], expected[2].at[:, :-2].set(0), None))


def test_lifted_function_can_be_rematerialised_and_mapped_over_adapters():
    fn, weight = CASES["remat"], adapt_one("stack")
    assert_lifts(fn, adapt(fn), lift=lambda loss: jax.checkpoint(jlora.lift(loss)))
    axes = dataclasses.replace(weight, base=0, u=0, v=0, scale=None)
    mapped = jax.vmap(jlora.lift(jnp.matmul), in_axes=(None, axes))(X, weight)
    assert_same(mapped, X @ jlora.merge(weight))


def test_while_loop_takes_weights_in_its_carry_and_as_constants():
    def is_small(carry):
        return carry[0][0, 0] < 9

    def step(carry):
        return abs(carry[0]) + abs(carry[0] @ carry[1]) + 4, carry[1]

    def fn(square):
        constant = jax.lax.while_loop(
            is_small, lambda c: (abs(c[0] @ square) + 9,), (X,)
        )
        return constant, jax.lax.while_loop(is_small, step, (X, square))[0]

    for rank in (
        2,
        3,
    ):  # the same step: what was traced for one rank may not serve the other
        weight = adapt_one("square", rank)
        assert_same(jlora.lift(fn)(weight), fn(jlora.merge(weight)))


@pytest.mark.parametrize("case", THIN)
def test_no_product_of_the_size_of_a_weight_is_formed(case):
    fn, adapted = CASES[case], adapt(CASES[case], rank=1)
    trainable, frozen = jlora.split_trainable(adapted)

    def list_sizes(way):
        loss = way(
            lambda params: sum(
                jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(**params))
            )
        )
        gradient = jax.jit(
            jax.grad(lambda trainable: loss(jlora.join(trainable, frozen)))
        )
        program = gradient.lower(trainable).as_text()
        shapes = re.findall(
            r"(?:dot_general|multiply) .* tensor<([\dx]+)xf32>\n", program
        )
        return {np.prod(np.array(shape.split("x"), int)) for shape in shapes}

    weights = adapted.values()
    whole = {w.base.size for w in weights} | {
        w.u.shape[-2] * w.v.shape[-1] for w in weights
    }
    assert whole & list_sizes(jlora.on_merged)
    assert not whole & list_sizes(jlora.lift)


@pytest.mark.parametrize("operation", REFUSED)
def test_what_needs_the_whole_weight_is_refused_or_forms_it(operation):
    fn, adapted = REFUSED[operation], adapt(REFUSED[operation])
    with pytest.raises(
        ValueError, match=f"^({'|'.join(adapted)}): `fn` must use .*{operation}"
    ):
        jlora.lift(lambda params: fn(**params))(adapted)
    assert_lifts(fn, adapted, lift=lambda loss: jlora.lift(loss, materialize=True))


def test_one_trace_serves_all_values_of_the_factors():
    shapes, weight = [], adapt_one("w")
    run = jax.jit(jlora.lift(lambda w: (shapes.append(w.shape), X @ w)[1]))
    assert not np.allclose(
        run(weight), run(dataclasses.replace(weight, v=weight.v + 1))
    )
    assert shapes == [(6, 5)]


def test_arguments_of_every_kind_reach_the_function():
    def fn(w, x, bias=None, *, table, power, activation, key):
        noise = jax.random.normal(key, x.shape, jnp.float32)
        return bias, activation((x + noise) @ w) ** power, table[IDS]

    settings = {"power": 2, "activation": jnp.tanh, "key": jax.random.key(9)}
    w, table = adapt_one("w"), adapt_one("table")
    found = jlora.lift(fn)(w, np.asarray(X), table=table, **settings)
    assert_same(found, fn(jlora.merge(w), X, table=jlora.merge(table), **settings))
    for path, args, kwargs in [("argument 1", (X, w), {}), ("w", (X,), {"w": w})]:
        with pytest.raises(ValueError, match=f"{path}: `fn` must"):
            jlora.lift(lambda x, w: x @ jnp.abs(w))(*args, **kwargs)


def test_without_quax_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", {"numpy": "found"}.get)
    with pytest.raises(ImportError, match=r"`lift` must have quax.*jlora\[lift\]"):
        jlora.lift(jnp.sin)


def test_importing_jlora_loads_none_of_the_extras():
    code = "import jlora, sys; print({'quax', 'equinox', 'flax'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
