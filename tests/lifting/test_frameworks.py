"""Models of Flax Linen, Flax NNX and Equinox, plain dicts, a pretrained encoder."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from benchmarks.models import minilm
from jlora.adaptation.paths import list_leaves
from jlora.initializers.lookup import list_names

# The libraries themselves mix dtypes; Linen's layers add vectors to stacks of rows.
pytestmark = pytest.mark.usefixtures("standard_promotion")
IDS = np.array([[1, 4, 9, 2, 10, 0], [3, 3, 8, 5, 6, 7]], np.int32)
# Each weight is rounded once more, by 6e-8 of its largest entry, in about five layers:
# the outputs differ by about 1e-6.
CLOSE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Compile with few optimizations: most of the time here goes into compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Model(NamedTuple):
    params: Any
    apply: Any  # apply(params, ids [batch, time]) -> [batch, time, outputs]
    rules: list
    num_weights: int  # number of weights that the rules adapt


def rule(pattern, layout="io"):
    return jlora.Rule(pattern, 2, layout=layout, trainable="uv")


def make_linen():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(
                nn.LayerNorm()(x)
            )
            return x + nn.gelu(nn.Dense(8, name="dense")(nn.LayerNorm()(x))), None

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="embed")(ids)
            x = x + nn.Conv(8, (3,), name="conv")(x)
            layers = nn.scan(
                nn.remat(Block),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return nn.Dense(8, name="head")(layers(name="layers")(x, None)[0])

    model = Encoder()
    rules = [
        rule("attention/(query|key|value)", "bioo"),
        rule("attention/out", "biio"),
        rule("layers", "bio"),
        rule("conv", "iio"),
        rule(".*"),
    ]
    return Model(model.init(jax.random.key(0), IDS), model.apply, rules, 8)


def make_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Encoder(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3, 1), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            x = x + self.conv(x[:, :, None])[:, :, 0]
            return self.head(nnx.gelu(self.norm(x + self.attention(x))))

    graph, state = nnx.split(Encoder(nnx.Rngs(0)))
    rules = [
        rule("attention/(query|key|value)", "ioo"),
        rule("attention/out", "iio"),
        rule("conv", "iiio"),
        rule("/value$"),
    ]
    return Model(state, lambda state, ids: nnx.merge(graph, state)(ids), rules, 7)


def make_module():
    eqx = pytest.importorskip("equinox")

    class Encoder(eqx.Module):
        embed: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __call__(self, ids):
            x = jax.vmap(self.embed)(ids)
            x = x + self.attention(x, x, x)
            return jax.vmap(lambda row: self.mlp(self.norm(row)))(x)

    keys = jax.random.split(jax.random.key(0), 3)
    module = Encoder(
        eqx.nn.Embedding(11, 8, key=keys[0]),
        eqx.nn.MultiheadAttention(2, 8, key=keys[1]),
        eqx.nn.LayerNorm(8),
        eqx.nn.MLP(8, 8, 16, 1, key=keys[2]),
    )
    return module, [rule("embed"), rule(".*", "oi")]


def make_equinox():
    module, rules = make_module()
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(module, eqx.is_array)
    return Model(
        params, lambda params, ids: jax.vmap(eqx.combine(params, static))(ids), rules, 7
    )


def make_names():
    """Return a checkpoint in torch's layout: each matrix is [outputs, inputs]."""
    rng, layers = np.random.default_rng(0), ["model.layers.0.", "model.layers.1."]
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in layers:
        shapes |= {f"{layer}{name}_proj.weight": (8, 8) for name in "qo"}
        shapes[f"{layer}o_proj.bias"] = (8,)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) / 3
        for name, shape in shapes.items()
    }

    def apply(params, ids):
        table = params["model.embed_tokens.weight"]
        x = table[ids]
        for layer in layers:
            hidden = jnp.tanh(x @ params[f"{layer}q_proj.weight"].T)
            x += hidden @ params[f"{layer}o_proj.weight"].T
            x += params[f"{layer}o_proj.bias"][None, None]
        return x * params["model.norm.weight"][None, None] @ table.T

    return Model(params, apply, [rule("embed"), rule(".*", "oi")], 5)


@functools.cache
def adapt(make):
    model = make()
    plan = jlora.make_plan(model.params, model.rules)
    return model, plan, jlora.adapt(model.params, plan, key=jax.random.key(1))


def assert_close(found, expected):
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=CLOSE * np.abs(expected).max()
    )


every_kind = pytest.mark.parametrize(
    "make", [make_linen, make_nnx, make_equinox, make_names]
)


@every_kind
def test_biases_and_norms_are_skipped_and_named(make):
    model, plan, _ = adapt(make)
    assert len(plan.entries) == model.num_weights
    adapted = {entry.path for entry in plan.entries}
    others = {path for path, _ in list_leaves(model.params)} - adapted
    assert {path for path, _ in plan.skipped} == others
    assert all(re.search("norm|bias", path.lower()) for path in others)


@every_kind
def test_merge_restores_the_tree(make):
    def check(old, new):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        if jnp.issubdtype(old.dtype, jnp.floating):
            # The base and the merged weight are each rounded once.
            bound = 4 * jnp.finfo(old.dtype).eps * np.abs(old).max()
            np.testing.assert_allclose(new, old, rtol=0, atol=bound)

    model, _, adapted = adapt(make)
    jax.tree.map(check, model.params, jlora.merge(adapted))


@every_kind
def test_lifted_model_has_the_output_and_gradients_of_the_merged_one(make):
    model, _, adapted = adapt(make)
    trainable, frozen = jlora.split_trainable(adapted)

    def differentiate(way):
        def loss(params):
            result = model.apply(params, IDS)
            return jnp.sum(jnp.sin(result)), result

        gradient = jax.grad(
            lambda part: way(loss)(jlora.join(part, frozen)), has_aux=True
        )
        return jax.jit(gradient)(trainable)

    gradients, result = differentiate(jlora.lift)
    expected, merged = differentiate(jlora.on_merged)
    assert_close(result, jax.jit(model.apply)(model.params, IDS))
    assert_close(result, merged)
    assert len(jax.tree.leaves(gradients)) == 2 * model.num_weights
    jax.tree.map(assert_close, gradients, expected)


@every_kind
def test_fit_trains_a_lifted_loss(make):
    model, _, adapted = adapt(make)

    def loss(params, ids):
        return jnp.mean((model.apply(params, ids) - 1) ** 2)

    result = jlora.fit(
        jlora.lift(loss), adapted, optax.adam(0.03), [IDS] * 5, progress=False
    )
    assert result.losses[-1] < 0.9 * result.losses[0]


def test_equinox_module_is_lifted_itself_as_argument_and_as_function():
    eqx = pytest.importorskip("equinox")
    module, rules = make_module()
    adapted = jlora.adapt(module, jlora.make_plan(module, rules), key=jax.random.key(1))

    @eqx.filter_jit
    def run(module, adapted):
        as_argument = jlora.lift(lambda module: jax.vmap(module)(IDS))(adapted)
        return jax.vmap(module)(IDS), as_argument, jax.vmap(jlora.lift(adapted))(IDS)

    plain, as_argument, as_function = run(module, adapted)
    assert_close(as_argument, plain)
    assert_close(as_function, plain)


# The initializers that leave the weight unchanged. Quantised bases and "difference"
# change it.
KEEPING = [
    init
    for init in list_names()
    if init not in ("loftq", "qpissa", "qera", "difference")
]
INITIALIZERS = [
    ("pissa", "words"),
    *((init, "layers/0/attention/(query|out)/w$") for init in KEEPING),
]
embed = jax.jit(minilm.embed_sentences)
embed_lifted = jax.jit(jlora.lift(minilm.embed_sentences))


@pytest.mark.parametrize(("init", "pattern"), INITIALIZERS)
def test_pretrained_encoder_embeds_as_before(minilm_params, init, pattern):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(384, 384)).astype(np.float32)
    x = {"corda": x.T @ x, "eva": x[:8], "lora_ga": x}.get(init)

    plan = jlora.make_plan(minilm_params, jlora.Rule(pattern, 4, init=init))
    data = {entry.path: x for entry in plan.entries} if x is not None else None
    adapted = jlora.adapt(minilm_params, plan, key=jax.random.key(0), data=data)

    batch = rng.integers(999, 30522, (2, 6), dtype=np.int32), np.ones((2, 6), np.int32)
    found, plain = embed_lifted(adapted, *batch), embed(minilm_params, *batch)
    # The same tolerance as in test_minilm: the entries are about 0.05, and a wrong
    # factor changes them by 0.05.
    np.testing.assert_allclose(found, plain, rtol=0, atol=2e-6)
