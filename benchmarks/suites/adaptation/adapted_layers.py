"""Groups of the adaptation suite: one linear layer, x w + (x u) v, and its gradients."""

import functools

import jax
import numpy as np

import jlora
from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.harness import Contender, Group
from benchmarks.run.preparation import prepare_jax

SUITE = "adaptation"


def make_layer_group(size, tokens, rank):
    """Return the group of one adapted square layer, forward and backward."""
    name = f"{size}×{size}, {tokens} tokens, rank {rank}, float32"
    fields = Case("none", "linear", rank, "normal", tokens=tokens)
    contenders = (
        Contender(
            "jlora apply_factors", _prepare_factors, "jlora", "gradients of x, u and v"
        ),
        Contender(
            "qwix",
            _prepare_qwix,
            setting="LoraProvider on nnx.Linear, alpha = rank",
            requires=("qwix", "flax"),
        ),
        Contender(
            "flax nnx LoRALinear",
            functools.partial(_prepare_flax, wrapped=False),
            setting="without bias",
            requires=("flax",),
        ),
        Contender(
            "flax nnx LoRA",
            functools.partial(_prepare_flax, wrapped=True),
            setting="around nnx.Linear without bias",
            requires=("flax",),
        ),
        Contender(
            "jax plain",
            _prepare_plain,
            setting="x @ w and the gradient of x alone: no adapter",
        ),
    )
    return Group(
        SUITE,
        "lora layer forward+backward",
        NamedCase(name, (size, size), fields),
        lambda: make_layer(size, tokens, rank),
        contenders,
        _measure_layer,
        # What the plain layer needs, adapter aside: two products; each array moved once.
        flops=4.0 * tokens * size**2,
        bytes=4.0 * (size**2 + 4 * tokens * size),
        precision="default",
    )


def make_layer(size, tokens, rank):
    """Return float32 x [t, m], w [m, n], u [m, r], v [r, n] and the cotangent of y [t, n]."""
    rng = np.random.default_rng(0)
    shapes = (tokens, size), (size, size), (size, rank), (rank, size), (tokens, size)
    scales = 1, size**-0.5, size**-0.5, rank**-0.5, 1
    return tuple(
        np.float32(scale) * rng.standard_normal(shape, np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def _prepare_factors(x, w, u, v, g):
    def run(x, w, u, v, g):
        y, pull = jax.vjp(
            lambda x, u, v: jlora.apply_factors(x, jlora.Factors(u, v), w), x, u, v
        )
        dx, du, dv = pull(g)
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, x, w, u, v, g)


def _prepare_plain(x, w, u, v, g):
    def run(x, w, g):
        y, pull = jax.vjp(lambda x: x @ w, x)
        return {"plain y": y, "plain dx": pull(g)[0]}

    return prepare_jax(run, x, w, g)


def _prepare_flax(x, w, u, v, g, *, wrapped):
    from flax import nnx

    rngs, (m, n), rank = nnx.Rngs(0), w.shape, u.shape[-1]
    if wrapped:
        inner = nnx.Linear(m, n, use_bias=False, rngs=rngs)
        layer = lora = nnx.LoRA(m, rank, n, base_module=inner, rngs=rngs)
    else:
        inner = layer = nnx.LoRALinear(m, n, lora_rank=rank, use_bias=False, rngs=rngs)
        lora = layer.lora
    inner.kernel[...] = w
    lora.lora_a[...], lora.lora_b[...] = u, v
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
        y, pull = jax.vjp(
            lambda x, factors: nnx.merge(graph, factors, rest)(x), x, factors
        )
        dx, gradients = pull(g)
        du, dv = jax.tree.leaves(gradients)  # in the order of their names: ..._a, ..._b
        return {"y": y, "dx": dx, "du": du, "dv": dv}

    return prepare_jax(run, factors, rest, x, g)


def _measure_layer(inputs, found):
    x, w, u, v, g = (part.astype(np.float64) for part in inputs)
    expected = {
        "plain y": x @ w,
        "plain dx": g @ w.T,
        "y": x @ w + (x @ u) @ v,
        "dx": g @ w.T + (g @ v.T) @ u.T,
        "du": x.T @ (g @ v.T),
        "dv": (x @ u).T @ g,
    }
    differences = {
        name: np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name])
        for name, value in found.items()
    }
    return {"relative error": max(differences.values()), **differences}
