"""One adapted linear layer, x w + (x u) v, and its gradients."""

import jax
import numpy as np

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax

SUITE = "adaptation"


def make_layer_group(size, tokens, rank):
    """Return the group of one adapted square layer, forward and backward."""
    name = f"{size}×{size}, {tokens} tokens, rank {rank}, float32"
    fields = Case("none", "linear", rank, "normal", tokens=tokens)

    return Group(
        SUITE,
        "lora layer forward+backward",
        NamedCase(name, (size, size), fields),
        lambda: make_layer(size, tokens, rank),
        _list_contenders(),
        _measure_layer,
        # The least work is the plain layer's, without the adapter: two products, each
        # array moved once.
        flops=4.0 * tokens * size**2,
        bytes=4.0 * (size**2 + 4 * tokens * size),
        precision="default",
    )


def make_layer(size, tokens, rank):
    """Return float32 x [t, m], w [m, n], u [m, r], v [r, n], the cotangent g [t, n]."""
    rng = np.random.default_rng(0)

    def draw(rows, columns, scale):
        return np.float32(scale) * rng.standard_normal((rows, columns), np.float32)

    return (
        draw(tokens, size, 1),
        draw(size, size, size**-0.5),
        draw(size, rank, size**-0.5),
        draw(rank, size, rank**-0.5),
        draw(tokens, size, 1),
    )


def _list_contenders():
    ours = Contender(
        "jlora apply_factors", _prepare_factors, "jlora", "gradients of x, u and v"
    )
    qwix = Contender(
        "qwix",
        _prepare_qwix,
        setting="LoraProvider on nnx.Linear, alpha = rank",
        requires=("qwix", "flax"),
    )
    lora_linear = Contender(
        "flax nnx LoRALinear",
        _prepare_lora_linear,
        setting="without bias",
        requires=("flax",),
    )
    lora_wrapper = Contender(
        "flax nnx LoRA",
        _prepare_lora_wrapper,
        setting="around nnx.Linear without bias",
        requires=("flax",),
    )
    plain = Contender(
        "jax plain",
        _prepare_plain,
        setting="x @ w and the gradient of x alone: no adapter",
    )

    return ours, qwix, lora_linear, lora_wrapper, plain


def _prepare_factors(x, w, u, v, g):
    def run(x, w, u, v, g):
        def apply(x, u, v):
            return jlora.apply_factors(x, jlora.Factors(u, v), w)

        y, pull_back = jax.vjp(apply, x, u, v)
        dx, du, dv = pull_back(g)
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, x, w, u, v, g)


def _prepare_plain(x, w, u, v, g):
    def run(x, w, g):
        y, pull_back = jax.vjp(lambda x: x @ w, x)
        return {"plain y": y, "plain dx": pull_back(g)[0]}

    return prepare_jax(run, x, w, g)


def _prepare_lora_linear(x, w, u, v, g):
    from flax import nnx

    (m, n), rank = w.shape, u.shape[-1]
    layer = nnx.LoRALinear(m, n, lora_rank=rank, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = w
    layer.lora.lora_a[...], layer.lora.lora_b[...] = u, v
    return _prepare_nnx(layer, x, g)


def _prepare_lora_wrapper(x, w, u, v, g):
    from flax import nnx

    rngs, (m, n), rank = nnx.Rngs(0), w.shape, u.shape[-1]
    linear = nnx.Linear(m, n, use_bias=False, rngs=rngs)
    layer = nnx.LoRA(m, rank, n, base_module=linear, rngs=rngs)
    linear.kernel[...] = w
    layer.lora_a[...], layer.lora_b[...] = u, v
    return _prepare_nnx(layer, x, g)


def _prepare_qwix(x, w, u, v, g):
    import qwix
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(*w.shape, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    rank = u.shape[-1]
    provider = qwix.LoraProvider(module_path=".*linear", rank=rank, alpha=float(rank))
    layer = qwix.apply_lora_to_model(Model(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    layer.linear.kernel[...] = w
    layer.linear.kernel_lora_a[...], layer.linear.kernel_lora_b[...] = u, v
    return _prepare_nnx(layer, x, g)


def _prepare_nnx(layer, x, g):
    """Prepare an nnx layer whose adapters are the only nnx.LoRAParam in it."""
    from flax import nnx

    graph, factors, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def run(factors, rest, x, g):
        def apply(x, factors):
            return nnx.merge(graph, factors, rest)(x)

        y, pull_back = jax.vjp(apply, x, factors)
        dx, gradients = pull_back(g)
        du, dv = jax.tree.leaves(gradients)  # in the order of their names: ..._a, ..._b
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, factors, rest, x, g)


def _measure_layer(inputs, found):
    x, w, u, v, g = (each.astype(np.float64) for each in inputs)
    expected = {
        "plain y": x @ w,
        "plain dx": g @ w.T,
        "y": x @ w + (x @ u) @ v,
        "dx": g @ w.T + (g @ v.T) @ u.T,
        "du": x.T @ (g @ v.T),
        "dv": (x @ u).T @ g,
    }

    errors = {}
    for name, value in found.items():
        difference = np.linalg.norm(value - expected[name])
        errors[name] = difference / np.linalg.norm(expected[name])
    return {"relative error": max(errors.values()), **errors}
