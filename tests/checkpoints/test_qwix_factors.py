"""Adapters of qwix: the axes of their factors, and a model of qwix itself."""

import re

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints import load_adapter
from tests.helpers.adapter_files import check, draw


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.kernel",
        "layers/0/attn/kernel",
        "['layers']/[0]/['attn']/['kernel']",
    ],
)
def test_qwix_joins_the_keys_with_dots(tmp_path, suffix, name):
    end = "']" if name.endswith("]") else ""
    name = name.removesuffix("']")
    tensors = {f"{name}_lora_a{end}": draw(6, 2), f"{name}_lora_b{end}": draw(2, 4)}
    tensors |= {"out/w_lora_a/value": draw(4, 2), "out/w_lora_b/value": draw(2, 6)}
    file = tmp_path / f"adapter{suffix}"
    jlora.save_arrays(file, tensors)
    expected = {
        "layers.0.attn.kernel": 2 * draw(6, 2) @ draw(2, 4),
        "out.w": 2 * draw(4, 2) @ draw(2, 6),
    }
    check(load_adapter(file, scale=2), expected)


@pytest.mark.parametrize(
    ("a", "b", "u", "v"),
    [
        ((6, 2), (2, 3, 4), (6, 2), (2, 12)),
        ((6, 2), (2, 3, 4, 5), (6, 2), (2, 60)),
        ((3, 4, 2), (2, 6), (12, 2), (2, 6)),
        ((5, 6, 2), (5, 2, 4), (5, 6, 2), (5, 2, 4)),
        ((5, 6, 2), (5, 2, 3, 4), (5, 6, 2), (5, 2, 12)),
        ((5, 3, 4, 2), (5, 2, 6), (5, 12, 2), (5, 2, 6)),
        ((5, 7, 6, 2), (5, 7, 2, 4), (5, 7, 6, 2), (5, 7, 2, 4)),
        ((1, 1, 6, 2), (2, 4), (6, 2), (2, 4)),
    ],
)
def test_qwix_merges_the_axes_of_an_einsum(file, a, b, u, v):
    jlora.save_arrays(file, {"w_lora_a": draw(*a), "w_lora_b": draw(*b)})
    pair = load_adapter(file, scale=1)["w"]
    assert (pair.u.shape, pair.v.shape) == (u, v)
    np.testing.assert_array_equal(pair.u.ravel(), draw(*a).ravel())


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ((6, 3), (2, 4), "must hold factors of one rank, got a (6, 3) and b (2, 4)"),
        ((6,), (2, 4), "must hold factors of one rank"),
        ((2, 6, 2), (2, 2, 4), "must hold factors that can be read in one way"),
        ((3, 4, 2), (2, 5, 6), "must hold factors that can be read in one way"),
        ((2, 2, 6, 2), (2, 2, 2, 4), "must hold factors that can be read in one way"),
        ((3, 3, 6, 2), (2, 4), "got factors of a convolution, (3, 3, 6, 2) and (2, 4)"),
    ],
)
def test_shapes_of_qwix_that_do_not_decide_are_refused(file, a, b, text):
    jlora.save_arrays(file, {"m/w_lora_a": draw(*a), "m/w_lora_b": draw(*b)})
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        load_adapter(file, scale=1)
    assert str(error.value).startswith(f"{file}: ")
    assert "at m.w." in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_factors_of_a_qwix_model_give_its_outputs(tmp_path, standard_promotion, suffix):
    qwix, nnx = pytest.importorskip("qwix"), pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Einsum("td,ndh->tnh", (3, 8, 4), rngs=rngs)
            self.out = nnx.Einsum("tnh,nhd->td", (3, 4, 6), rngs=rngs)
            self.up = nnx.Linear(6, 10, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.up(self.out(self.query(x)))

    rank, alpha = 2, 5.0
    x = jax.random.normal(jax.random.key(0), (7, 8))
    provider = qwix.LoraProvider(module_path=".*", rank=rank, alpha=alpha)
    model = qwix.apply_lora_to_model(Model(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    tensors = {}
    for layer in ("query", "out", "up"):
        for side in "ab":
            leaf = getattr(getattr(model, layer), f"kernel_lora_{side}")
            leaf[...] = jax.random.normal(jax.random.key(len(tensors)), leaf.shape)
            tensors[f"{layer}/kernel_lora_{side}"] = np.asarray(leaf[...])

    file = tmp_path / f"lora{suffix}"
    jlora.save_arrays(file, tensors)
    found = load_adapter(file, scale=alpha / rank)
    assert set(found) == {"query.kernel", "out.kernel", "up.kernel"}

    # Weights as [in, out], in the order of the axes of `merge_axes`.
    weights = {
        "query.kernel": model.query.kernel[...].transpose(1, 0, 2).reshape(8, 12),
        "out.kernel": model.out.kernel[...].reshape(12, 6),
        "up.kernel": model.up.kernel[...],
    }
    y = x
    for path, w in weights.items():
        u, v = found[path]
        y = y @ (w + u @ v)
    # Float32 sums of up to 12 terms, in another order.
    np.testing.assert_allclose(y, model(x), rtol=2e-5, atol=2e-4)
