"""Bases of registered array types: a toy type of 30 lines, and qwix's QArray."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("dtype",),
)
@dataclasses.dataclass(frozen=True)
class ToyInt8:
    """A matrix of integers with a scale for each column."""

    codes: jax.Array  # int8 [..., m, n]
    scales: jax.Array  # float32 [..., 1, n]
    dtype: np.dtype

    @property
    def shape(self):
        return self.codes.shape

    @property
    def ndim(self):
        return self.codes.ndim


def quantize_toy(w):
    scales = jnp.max(abs(w), axis=-2, keepdims=True).astype(jnp.float32) / 127
    codes = jnp.round(w / scales).astype(jnp.int8)
    return ToyInt8(codes, scales, jnp.dtype(w.dtype))


def dequantize_toy(array):
    return array.codes.astype(jnp.float32) * array.scales


jlora.quantization.register(ToyInt8, dequantize_toy)


def make_toy(w):
    return quantize_toy(w), dequantize_toy(quantize_toy(w))


def make_qwix(w):
    qwix = pytest.importorskip("qwix")
    array = qwix.quantize(w, "int8", channelwise_axes=(w.ndim - 1,))
    return array, qwix.dequantize(array)


KINDS = {"toy": make_toy, "qwix": make_qwix}


@pytest.fixture(params=list(KINDS))
def bases(request, standard_promotion):
    """Return {path: registered array} and {path: its values}."""
    w = jax.random.normal(jax.random.key(0), (3, 8, 6), jnp.float32)
    pairs = {"w": KINDS[request.param](w[0]), "stack": KINDS[request.param](w)}
    return tuple({path: pair[i] for path, pair in pairs.items()} for i in range(2))


def adapt(params, **settings):
    plan = jlora.make_plan(params, jlora.Rule("w|stack", 2, init="lora", **settings))
    adapted = jlora.adapt(params, plan, key=jax.random.key(1))
    # Make the delta nonzero, so that the tests see it in every sum.
    return jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, v=leaf.v + 0.5),
        adapted,
        is_leaf=lambda leaf: isinstance(leaf, jlora.AdaptedWeight),
    )


def test_every_reader_gives_the_values_of_the_plain_base(bases):
    quantized, plain = bases
    adapted, expected = adapt(quantized), adapt(plain)
    assert adapted["w"].base is quantized["w"]
    assert adapted["stack"].base is quantized["stack"]
    np.testing.assert_array_equal(adapted["stack"].u, expected["stack"].u)

    # The same sums in the same order but fused differently: a few roundings of float32.
    close = functools.partial(np.testing.assert_allclose, atol=3e-6)
    x = jax.random.normal(jax.random.key(2), (5, 8))
    close(x @ adapted["w"], x @ expected["w"])
    jitted = jax.jit(lambda x, w: x @ w)
    close(jitted(x, adapted["w"]), x @ expected["w"])

    merged, dense = jlora.merge(adapted), jlora.merge(expected)
    close(merged["w"], dense["w"])
    close(merged["stack"], dense["stack"])
    model = jlora.lift(lambda params, x: jnp.einsum("btm,bmn->btn", x, params["stack"]))
    many = jax.random.normal(jax.random.key(3), (3, 5, 8))
    close(model(adapted, many), model(expected, many), atol=1e-5)

    found = jlora.diagnose(plain, adapted, key=jax.random.key(4))
    same = jlora.diagnose(plain, expected, key=jax.random.key(4))
    close(found.change, same.change, rtol=1e-5)


def test_training_does_not_change_the_codes(bases):
    quantized, _ = bases
    adapted = adapt({"w": quantized["w"]}, trainable="uv")

    def loss(params, x):
        return jnp.mean((x @ params["w"] - 1) ** 2)

    batches = [jnp.eye(8)] * 60
    result = jlora.fit(loss, adapted, optax.adam(0.05), batches, progress=False)
    assert result.losses[-1] < 0.8 * result.losses[0]
    before, after = map(jax.tree.leaves, (quantized["w"], result.adapted["w"].base))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_ranks_are_chosen_from_the_dequantised_values(bases):
    quantized, plain = bases
    rule = jlora.Rule("w", jlora.RankRule("energy", energy=0.8), init="lora")
    ranks = [jlora.make_plan(p, rule).entries[0].rank for p in (quantized, plain)]
    assert ranks[0] == ranks[1]


def test_it_works_under_jit(bases):
    quantized, _ = bases
    plan = jlora.make_plan(quantized, jlora.Rule("w|stack", 2, init="lora"))
    run = jax.jit(lambda params: jlora.adapt(params, plan, key=jax.random.key(1)))
    eager = jlora.adapt(quantized, plan, key=jax.random.key(1))
    np.testing.assert_allclose(run(quantized)["stack"].u, eager["stack"].u, atol=1e-6)


def test_refusals(bases):
    quantized, _ = bases
    plan = jlora.make_plan(quantized, jlora.Rule("w", 2, init="pissa"))
    text = (
        "^w: `init` must leave a base of type (ToyInt8|QArray) unchanged, got 'pissa'"
    )
    with pytest.raises(ValueError, match=text):
        jlora.adapt(quantized, plan, key=jax.random.key(0))
    with pytest.raises(TypeError, match="`array_type` must be a class, got str"):
        jlora.quantization.register("ToyInt8", dequantize_toy)
    with pytest.raises(TypeError, match="`dequantize` must be a function of one array"):
        jlora.quantization.register(ToyInt8, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
def test_a_quantised_linen_model_of_qwix_is_adapted(standard_promotion):
    qwix, linen = pytest.importorskip("qwix"), pytest.importorskip("flax.linen")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    model = qwix.quantize_model(linen.Dense(8), qwix.PtqProvider([rule]))
    params = model.init(jax.random.key(0), x)["params"]
    assert type(params["kernel"]).__name__ == "WithAux"

    plan = jlora.make_plan(params, jlora.Rule("kernel", 2, init="lora"))
    adapted = jlora.adapt(params, plan, key=jax.random.key(1))
    assert adapted["kernel"].base is params["kernel"]
    exact = qwix.dequantize(params["kernel"].array)
    # The factors of "lora" add zero.
    np.testing.assert_allclose(x @ adapted["kernel"], x @ exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jlora.merge(adapted)["kernel"], exact)
