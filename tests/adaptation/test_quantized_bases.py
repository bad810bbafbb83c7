"""`Rule(quantize=format)`: the base is stored in few bits, on the whole road."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.quantization import QuantizedArray, int4, int8, nf4

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
INITS = ["lora", "pissa", "milora", "olora", "loftq", "qpissa", "orthogonal"]
LAYOUTS = {
    "io": ((70, 48), lambda x, w: x @ w),
    "oi": ((48, 70), lambda x, w: x @ w.T),
    "ioo": ((70, 6, 8), lambda x, w: jnp.einsum("ti,iab->tab", x, w)),
    "boi": ((3, 48, 70), lambda x, w: jnp.einsum("ti,boi->bto", x, w)),
    "ibo": ((70, 3, 48), lambda x, w: jnp.einsum("ti,ibo->bto", x, w)),
}


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def adapt(w, **rule):
    params = {"w": w, "bias": jnp.zeros(3)}
    settings = {"rank": 4, "trainable": "uv", "quantize": nf4()} | rule
    plan = jlora.make_plan(params, jlora.Rule("w", **settings))
    return jlora.adapt(params, plan, key=KEY)


def measure(w, merged):
    return float(jnp.linalg.norm(merged - w) / jnp.linalg.norm(w))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_initializer_stores_its_base_in_the_format(init, layout):
    shape, _ = LAYOUTS[layout]
    w = draw(shape)
    weight = adapt(w, init=init, layout=layout)["w"]
    assert isinstance(weight.base, QuantizedArray)
    assert (weight.base.shape, weight.shape) == (shape, shape)
    merged = jlora.merge({"w": weight})["w"]
    # The error of NF4, less what the factors recover of it.
    assert 0.07 < measure(w, merged) < 0.097
    qlora = jlora.merge(adapt(w, init="lora", layout=layout))["w"]
    if init in ("pissa", "loftq", "qpissa"):
        assert measure(w, merged) < measure(w, qlora)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lifted_products_are_of_the_merged_weight(layout):
    shape, product = LAYOUTS[layout]
    adapted = adapt(draw(shape), init="pissa", layout=layout)
    merged = jlora.merge(adapted)["w"]
    x = draw((5, 70), 1)

    def loss(params, x):
        return jnp.sum(jnp.sin(product(x, params["w"])))

    found = jax.jit(jlora.lift(loss))(adapted, x)
    np.testing.assert_allclose(found, loss({"w": merged}, x), rtol=1e-4)
    gradient = jax.grad(jlora.lift(loss), argnums=1)(adapted, x)
    expected = jax.grad(loss, argnums=1)({"w": merged}, x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_traced_adapt_is_the_eager_one():
    w = draw((2, 48, 70))
    rule = jlora.Rule("w", 4, init="pissa", layout="oi", quantize="int8")
    plan = jlora.make_plan({"w": w}, rule)
    eager = jlora.adapt({"w": w}, plan, key=KEY)
    traced = jax.jit(lambda params: jlora.adapt(params, plan, key=KEY))({"w": w})
    pairs = (jlora.merge(each)["w"] for each in (eager, traced))
    # Two programs: the SVD differs in its last bits, and codes at a bound with it.
    assert measure(*pairs) < 1e-3


def test_fit_trains_the_factors_and_keeps_the_codes(tmp_path):
    w = draw((70, 48))
    mixed = {"w": w, "plain": draw((48, 8), 1)}
    rules = [
        jlora.Rule("w", 4, init="lora", trainable="uv", quantize=int4()),
        jlora.Rule("plain", 2, init="lora", trainable="uv"),
    ]
    adapted = jlora.adapt(mixed, jlora.make_plan(mixed, rules), key=KEY)
    x = draw((32, 70), 2)
    y = x @ (w + 0.1) @ mixed["plain"]

    def loss(params, batch):
        x, y = batch
        return jnp.mean((x @ params["w"] @ params["plain"] - y) ** 2)

    trainable, _ = jlora.split_trainable(adapted)
    assert trainable["w"].base is None
    result = jlora.fit(loss, adapted, optax.adam(0.01), [(x, y)] * 40, progress=False)
    assert result.losses[-1] < 0.5 * result.losses[0]
    before, after = (jax.tree.leaves(t["w"].base) for t in (adapted, result.adapted))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert isinstance(result.adapted["plain"].base, jax.Array)


def test_a_scan_takes_one_matrix_of_a_stack_at_a_time():
    w = draw((3, 48, 48))
    adapted = adapt(w, init="pissa")
    merged = jlora.merge(adapted)["w"]

    def run(params, x):
        body = lambda x, layer: (jnp.tanh(x @ layer), None)  # noqa: E731
        return jax.lax.scan(body, x, params["w"])[0]

    x = draw((5, 48), 1) / 50
    found = jax.jit(jlora.lift(run))(adapted, x)
    np.testing.assert_allclose(found, run({"w": merged}, x), rtol=1e-4, atol=1e-5)


def test_fit_computes_in_bfloat16_and_keeps_the_scales():
    adapted = adapt(draw((70, 48)), init="lora")
    seen = []

    def loss(params, x):
        seen.append((params["w"].dtype, params["w"].base.scales.offset.dtype))
        y = x.astype(jnp.bfloat16) @ params["w"]
        assert y.dtype == jnp.bfloat16
        return jnp.mean(y.astype(jnp.float32) ** 2)

    result = jlora.fit(
        loss,
        adapted,
        optax.adam(0.01),
        [draw((4, 70), 1)] * 3,
        compute_dtype=jnp.bfloat16,
        progress=False,
    )
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))}
    assert result.adapted["w"].dtype == jnp.float32
    np.testing.assert_array_equal(
        result.adapted["w"].base.dequantize(), adapted["w"].base.dequantize()
    )


def test_donation_deletes_the_weight():
    w = draw((70, 48)) + 0
    params = {"w": w}
    plan = jlora.make_plan(params, jlora.Rule("w", 4, init="pissa", quantize=nf4()))
    jlora.adapt(params, plan, key=KEY, donate=True)
    assert w.is_deleted()


def test_a_quantised_leaf_is_taken_as_it_is():
    base = jlora.quantization.quantize(draw((70, 48)), nf4())
    adapted = adapt(base, init="lora", quantize=None)
    assert adapted["w"].base is base
    with pytest.raises(ValueError, match="w: `quantize` must be None for a weight of"):
        adapt(base, init="lora")
    np.testing.assert_array_equal(jlora.merge(adapted)["w"], base.dequantize())
    found = jlora.diagnose({"w": base}, {"w": adapted["w"]}, key=KEY)
    assert found.change[0] == 0


def test_bfloat16_and_numpy():
    w = draw((70, 48)).astype(jnp.bfloat16)
    weight = adapt(w, init="lora")["w"]
    assert jlora.merge({"w": weight})["w"].dtype == jnp.bfloat16
    on_host = adapt(np.asarray(draw((70, 48))), init="pissa")["w"]
    same = adapt(draw((70, 48)), init="pissa")["w"]
    np.testing.assert_array_equal(on_host.base.dequantize(), same.base.dequantize())


def test_lookups_casts_and_slices_still_work():
    adapted = adapt(draw((70, 48)), init="pissa")
    merged = jlora.merge(adapted)["w"]
    ids = jnp.array([3, 0, 69])
    for fn in (
        lambda p: p["w"][ids],
        lambda p: draw((2, 70), 1) @ (2 * p["w"]),
        lambda p: draw((2, 70), 1).astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        lambda p: draw((2, 30), 1) @ p["w"][:30],
        lambda p: draw((2, 48), 1) @ p["w"].T,
    ):
        found = np.float32(jlora.lift(fn)(adapted))
        # A step of bfloat16 up to 32; the others are exact to float32.
        np.testing.assert_allclose(found, np.float32(fn({"w": merged})), atol=0.25)


@pytest.mark.parametrize(
    ("rule", "error", "text"),
    [
        ({"quantize": "nf3"}, ValueError, "quantize.*one of"),
        ({"quantize": 4}, ValueError, "`quantize` must be a format with init='pissa'"),
        ({"quantize": 4, "init": "loftq"}, TypeError, "a format or a function"),
    ],
)
def test_bad_rules(rule, error, text):
    with pytest.raises(error, match=text):
        jlora.Rule("w", 4, **rule)


def test_wide_weights_are_refused_by_path():
    with jax.enable_x64(True):
        w = jnp.ones((8, 8), jnp.float64)
        with pytest.raises(TypeError, match=r"^w: `params` must hold float32.*float64"):
            adapt(w, init="lora")


def test_labels_name_the_format():
    rule = jlora.Rule("w", 4, init=jlora.initializers.loftq(), quantize=int8())
    assert rule.initializer.label == "loftq(quantize=int8)"
    assert dataclasses.replace(rule, rank=2).format == int8()
