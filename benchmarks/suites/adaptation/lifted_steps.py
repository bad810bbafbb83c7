"""Groups of the adaptation suite: a step of training a Llama-shaped model's LoRA factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.adaptation.whole_models import list_layer_shapes

SUITE = "adaptation"
_HEAD_SIZE = 128


class Network(NamedTuple):
    """What a model is trained from: NumPy arrays by path, "layers/0/q"."""

    weights: dict  # [m, n]
    factors: dict  # {path: (u [m, r], v [r, n])}
    batch: tuple  # (x, y) [tokens, hidden]
    rank: int
    loss: float  # in float64


class Losses(NamedTuple):
    """What is judged of a step: the loss before it, and before the next one."""

    first: float
    second: float


def make_lifted_group(hidden, layers, tokens, rank):
    """Return the group of one step of Adam on u and v of all linear layers."""
    contenders = (
        Contender(
            "jlora lift",
            _prepare_lift,
            "jlora",
            "jlora.lift of the model of plain products, factors of jlora.adapt",
            requires=("quax",),
        ),
        Contender(
            "hand-written apply_factors",
            _prepare_hand_written,
            "jlora",
            "the same model, each product jlora.apply_factors",
        ),
        Contender(
            "qwix",
            _prepare_qwix,
            setting="LoraProvider on nnx.Linear, alpha = rank",
            requires=("qwix", "flax"),
        ),
        Contender(
            "flax nnx",
            _prepare_nnx,
            setting="nnx.LoRALinear without bias",
            requires=("flax",),
        ),
    )
    name = f"Llama-shaped, hidden {hidden}, {layers} layers, {tokens} tokens"
    fields = Case("llama", "all", rank, "normal", layers=layers, tokens=tokens)
    return Group(
        SUITE,
        "lifted training step",
        NamedCase(name, (hidden, hidden), fields),
        lambda: (make_network(hidden, layers, tokens, rank),),
        contenders,
        _measure_step,
        precision="default",
    )


def make_network(hidden, layers, tokens, rank):
    """Return a `Network` whose deltas are about as large as its weights."""
    rng = np.random.default_rng(0)
    weights, factors = {}, {}
    for layer in range(layers):
        for kind, (m, n) in list_layer_shapes(hidden).items():
            path = f"layers/{layer}/{kind}"
            weights[path] = _draw(rng, (m, n), m**-0.5)
            factors[path] = (
                _draw(rng, (m, rank), m**-0.5),
                _draw(rng, (rank, n), rank**-0.5),
            )
    batch = tuple(_draw(rng, (tokens, hidden), 1.0) for _ in range(2))
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (weights, factors, batch)
        )
        loss = float(jax.jit(_hand_written_loss)(exact[1], exact[0], exact[2]))
    return Network(weights, factors, batch, rank, loss)


def _draw(rng, shape, scale):
    return np.float32(scale) * rng.standard_normal(shape, np.float32)


def run_network(x, layers, multiply):
    """Return the hidden states [t, d] after layers of multiply(path, x) and what is between."""
    for layer in range(layers):

        def product(kind, x, prefix=f"layers/{layer}/"):
            return multiply(prefix + kind, x)

        normed = _normalize(x)
        q, k, v = (product(kind, normed) for kind in "qkv")
        x = x + product("o", _attend(q, k, v))
        normed = _normalize(x)
        x = x + product(
            "down", jax.nn.silu(product("gate", normed)) * product("up", normed)
        )
    return x


def _normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _attend(q, k, v):
    q, k, v = (
        part.reshape(len(part), -1, min(_HEAD_SIZE, part.shape[-1]))
        for part in (q, k, v)
    )
    mixed = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return mixed.reshape(q.shape[0], -1)


def _compare(x, y):
    return jnp.mean((x - y) ** 2)


def _plain_loss(weights, batch):
    x, y = batch
    return _compare(
        run_network(x, _count_layers(weights), lambda path, x: x @ weights[path]), y
    )


def _hand_written_loss(factors, weights, batch):
    x, y = batch

    def multiply(path, x):
        return jlora.apply_factors(x, jlora.Factors(*factors[path]), weights[path])

    return _compare(run_network(x, _count_layers(weights), multiply), y)


def _count_layers(paths):
    return 1 + max(int(path.split("/")[1]) for path in paths)


def _prepare_step(loss, trainable, frozen, batch):
    """Prepare a step of Adam; loss(trainable, frozen, batch), and the state is donated."""
    optimizer = optax.adam(1e-3)

    def step(carried, frozen, batch):
        trainable, state, _ = carried
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    start = trainable, optimizer.init(trainable), jnp.zeros((), jnp.float32)
    second = jax.jit(loss)

    def fetch(result):
        return Losses(float(result[2]), float(second(result[0], frozen, batch)))

    return prepare_jax(step, start, frozen, batch, donate=(0,))._replace(fetch=fetch)


def _prepare_lift(network):
    rule = jlora.Rule("layers", network.rank, init="lora", trainable="uv")
    plan = jlora.make_plan(network.weights, rule)
    adapted = jlora.adapt(network.weights, plan, key=jax.random.key(0))
    task = {path: jlora.Factors(*pair) for path, pair in network.factors.items()}
    trainable, frozen = jlora.split_trainable(
        jlora.adaptation.set_factors(adapted, task)
    )
    lifted = jlora.lift(_plain_loss)
    return _prepare_step(
        lambda trainable, frozen, batch: lifted(jlora.join(trainable, frozen), batch),
        trainable,
        frozen,
        network.batch,
    )


def _prepare_hand_written(network):
    return _prepare_step(
        _hand_written_loss, network.factors, network.weights, network.batch
    )


def _prepare_nnx(network):
    from flax import nnx

    def make_linear(path, rngs):
        shape = network.weights[path].shape
        layer = nnx.LoRALinear(
            *shape, lora_rank=network.rank, use_bias=False, rngs=rngs
        )
        layer.kernel[...] = network.weights[path]
        layer.lora.lora_a[...], layer.lora.lora_b[...] = network.factors[path]
        return layer

    return _prepare_module(_make_module(network, make_linear), network)


def _prepare_qwix(network):
    import qwix
    from flax import nnx

    model = _make_module(
        network,
        lambda path, rngs: nnx.Linear(
            *network.weights[path].shape, use_bias=False, rngs=rngs
        ),
    )
    provider = qwix.LoraProvider(
        module_path=".*", rank=network.rank, alpha=float(network.rank)
    )
    model = qwix.apply_lora_to_model(
        model, provider, network.batch[0], rngs=nnx.Rngs(1)
    )
    for path, layer in model.linears.items():
        layer.kernel[...] = network.weights[path]
        layer.kernel_lora_a[...], layer.kernel_lora_b[...] = network.factors[path]
    return _prepare_module(model, network)


def _make_module(network, make_linear):
    """Return an nnx module of the network, its products those of make_linear(path, rngs)."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linears = nnx.data(
                {path: make_linear(path, rngs) for path in network.weights}
            )

        def __call__(self, x):
            linears = self.linears
            return run_network(
                x, _count_layers(linears), lambda path, x: linears[path](x)
            )

    return Model(nnx.Rngs(0))


def _prepare_module(model, network):
    """Prepare an nnx model whose factors are the only nnx.LoRAParam in it."""
    from flax import nnx

    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    def loss(factors, rest, batch):
        x, y = batch
        return _compare(nnx.merge(graph, factors, rest)(x), y)

    return _prepare_step(loss, factors, rest, network.batch)


def _measure_step(inputs, losses):
    (network,) = inputs
    # The second one tells that the gradient was right: it is compared with nothing exact.
    return {
        "loss difference": abs(losses.first - network.loss) / network.loss,
        "loss after a step": losses.second / network.loss,
    }
