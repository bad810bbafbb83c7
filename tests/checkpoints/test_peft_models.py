"""Adapters on models of transformers: jlora and PEFT give the same outputs."""

import warnings

import jax
import numpy as np
import pytest

import jlora

for name in ("torch", "transformers", "peft"):
    pytest.importorskip(name)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

    from tests.helpers import peft_models

pytestmark = pytest.mark.filterwarnings("ignore")
# Outputs of size one after two layers in float32.
CLOSE = 2e-6
KEY = jax.random.key(0)


def draw_factors(shapes, rank=None):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return 0.2 * rng.standard_normal(shape).astype(np.float32)

    found = {}
    for index, (path, (*batch, m, n)) in enumerate(shapes.items()):
        r = 3 + index % 3 if not batch else 4
        found[path] = jlora.Factors(draw(*batch, m, r), draw(*batch, r, n))
    return found


def merge(tmp_path, model, adapter):
    base, output = tmp_path / "base", tmp_path / "merged"
    if not base.exists():
        model.save_pretrained(base)
    report = jlora.checkpoints.merge_checkpoint(base, adapter, output, progress=False)
    return peft_models.reload(output, model), report


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("name", peft_models.MODELS)
def test_peft_loads_what_jlora_writes_and_merges(tmp_path, name, portable):
    model = peft_models.make_model(peft_models.MODELS[name])
    factors = draw_factors(peft_models.list_shapes(model))
    adapter = tmp_path / "adapter"
    jlora.save_peft(adapter, factors, scale=-0.5, portable=portable)
    merged, report = merge(tmp_path, model, adapter)
    assert report.untied is None

    plain = peft_models.compute(model)
    found = peft_models.compute(peft.PeftModel.from_pretrained(model, adapter))
    assert np.abs(found - plain).max() > 0.05
    assert (
        np.abs(found - peft_models.compute(merged)).max() < CLOSE * np.abs(plain).max()
    )


PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
TRAINED = {
    "rslora": {"use_rslora": True, "target_modules": PROJECTIONS},
    "patterns": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"layers.1.*q_proj": 5},
        "alpha_pattern": {"down_proj": 2},
    },
    "dora": {"use_dora": True, "target_modules": PROJECTIONS},
    "biases of lora_B": {"lora_bias": True, "target_modules": ["q_proj"]},
    "whole modules": {
        "target_modules": PROJECTIONS,
        "modules_to_save": ["lm_head", "input_layernorm"],
    },
    "tokens": {
        "target_modules": PROJECTIONS,
        "trainable_token_indices": {"embed_tokens": [5, 1]},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "first layer": {"target_modules": PROJECTIONS, "layers_to_transform": 0},
    "excluded": {"target_modules": PROJECTIONS, "exclude_modules": ["down_proj"]},
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("is_tied", [False, True])
def test_jlora_merges_what_peft_trained(tmp_path, name, is_tied):
    has_bias = {"attention_bias": True} if "biases" in name else {}
    model = peft_models.make_model(
        lambda: peft_models.make_llama(tie_word_embeddings=is_tied, **has_bias)
    )
    if is_tied and name == "whole modules":
        pytest.skip("PEFT saves the head of a tied model under two names")
    model.save_pretrained(tmp_path / "base")
    trained = peft_models.train(model, **TRAINED[name])
    trained.save_pretrained(tmp_path / "adapter")
    expected = peft_models.compute(trained)

    merged, report = merge(tmp_path, model, tmp_path / "adapter")
    assert (report.untied is not None) == (is_tied and name == "embedding")
    found = peft_models.compute(merged)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_jlora_merges_conv1d_and_experts_of_peft(tmp_path, name):
    model = peft_models.make_model(peft_models.MODELS[name])
    model.save_pretrained(tmp_path / "base")
    settings = {
        "gpt2": {"target_modules": ["c_attn", "c_proj", "wte"]},
        "mixtral": {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    }[name]
    trained = peft_models.train(model, **settings)
    trained.save_pretrained(tmp_path / "adapter")
    expected = peft_models.compute(trained)
    merged, _ = merge(tmp_path, model, tmp_path / "adapter")
    found = peft_models.compute(merged)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


def test_several_adapters_add_up_with_their_weights(tmp_path):
    model = peft_models.make_model(peft_models.make_qwen3)
    shapes = peft_models.list_shapes(model)
    factors = draw_factors(shapes)
    for index in range(2):
        jlora.save_peft(tmp_path / str(index), factors, scale=0.5 + index)
    weights = {tmp_path / "0": 2.0, tmp_path / "1": -0.5}
    merged, _ = merge(tmp_path, model, weights)
    jlora.save_peft(tmp_path / "sum", factors, scale=2 * 0.5 - 0.5 * 1.5)
    expected = peft_models.compute(
        peft.PeftModel.from_pretrained(model, tmp_path / "sum")
    )
    found = peft_models.compute(merged)
    assert np.abs(found - expected).max() < CLOSE * np.abs(expected).max()


@pytest.mark.parametrize("name", peft_models.MODELS)
def test_peft_merges_the_same_weights(tmp_path, name):
    model = peft_models.make_model(peft_models.MODELS[name])
    factors = draw_factors(peft_models.list_shapes(model))
    jlora.save_peft(tmp_path / "adapter", factors)
    merged, _ = merge(tmp_path, model, tmp_path / "adapter")
    ours = merged.state_dict()
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    theirs = adapted.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        # Both sum in float32; weights have a size of about one.
        np.testing.assert_allclose(ours[key], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_model_merged_by_jlora_agrees_with_the_adapter(tmp_path, name):
    """PEFT's own merge changes both uses of the weight, and so the outputs."""
    makers = {"llama": peft_models.make_llama, "gpt2": peft_models.make_gpt2}
    model = peft_models.make_model(lambda: makers[name](tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "base")
    embedding = {"llama": "embed_tokens", "gpt2": "wte"}[name]
    trained = peft_models.train(model, target_modules=[embedding])
    trained.save_pretrained(tmp_path / "adapter")
    expected = peft_models.compute(trained)
    size = np.abs(expected).max()

    merged, report = merge(tmp_path, model, tmp_path / "adapter")
    assert report.untied == "lm_head.weight"
    assert np.abs(peft_models.compute(merged) - expected).max() < CLOSE * size
    theirs = peft_models.compute(trained.merge_and_unload())
    assert np.abs(theirs - expected).max() > 0.05 * size


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_extracted_and_initialised_as_stacks(tmp_path, name):
    makers = peft_models.MODELS | {"qwen3_moe": peft_models.make_qwen3_moe}
    model = peft_models.make_model(makers[name])
    model.save_pretrained(tmp_path / "base")
    factors = draw_factors(peft_models.list_shapes(model))
    jlora.save_peft(tmp_path / "adapter", factors)
    tuned, _ = merge(tmp_path, model, tmp_path / "adapter")
    tuned.save_pretrained(tmp_path / "tuned")
    expected = peft_models.compute(tuned)

    report = jlora.checkpoints.extract_checkpoint(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "extracted",
        rank=8,
        key=KEY,
        progress=False,
    )
    assert {row.module for row in report.modules} == set(factors)
    assert not report.skipped
    adapted = peft.PeftModel.from_pretrained(
        peft_models.reload(tmp_path / "base", model), tmp_path / "extracted"
    )
    found = peft_models.compute(adapted)
    # The differences of float32 weights have rank 8 up to their rounding.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    report = jlora.checkpoints.initialize_checkpoint(
        tmp_path / "base",
        tmp_path / "new",
        rank=4,
        targets="experts|q_proj",
        key=KEY,
        progress=False,
    )
    assert any("experts" in row.module for row in report.modules)
    base = peft_models.reload(tmp_path / "new" / "base", model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")
    expected, found = peft_models.compute(model), peft_models.compute(adapted)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_norms_biases_and_embeddings_are_extracted_whole(tmp_path):
    model = peft_models.make_model(peft_models.make_qwen2)
    model.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    for index, name in enumerate(model.state_dict()):
        if index % 3 or "embed" in name:
            peft_models.shift(model, name, rng)
    model.save_pretrained(tmp_path / "tuned")
    expected = peft_models.compute(model)

    report = jlora.checkpoints.extract_checkpoint(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "adapter",
        rank=64,
        targets="_proj",
        modules_to_save=".*",
        key=KEY,
        progress=False,
    )
    assert not report.skipped
    config = jlora.checkpoints.read_peft(tmp_path / "adapter").config
    assert config["bias"] == "lora_only"
    assert "model.embed_tokens" in config["modules_to_save"]
    base = peft_models.reload(tmp_path / "base", model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = peft_models.compute(adapted)
    # Full ranks in float32, through two layers.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    merged, _ = merge(tmp_path, model, tmp_path / "adapter")
    found = peft_models.compute(merged)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_minilm_initialised_by_jlora_keeps_its_output(tmp_path):
    folder = peft_models.find_minilm()
    jlora.checkpoints.initialize_checkpoint(
        folder, tmp_path / "new", rank=16, key=KEY, progress=False
    )
    model = peft_models.load_bert(folder)
    expected = peft_models.compute(model)
    base = peft_models.load_bert(tmp_path / "new" / "base")
    assert np.abs(peft_models.compute(base) - expected).max() > 0.01
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")
    found = peft_models.compute(adapted)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", peft_models.MODELS)
def test_an_initialised_model_has_the_output_of_the_plain_one(tmp_path, name):
    model = peft_models.make_model(peft_models.MODELS[name])
    model.save_pretrained(tmp_path / "model")
    jlora.checkpoints.initialize_checkpoint(
        tmp_path / "model", tmp_path / "new", rank=4, key=KEY, progress=False
    )
    expected = peft_models.compute(model)
    base = peft_models.reload(tmp_path / "new" / "base", model)
    assert np.abs(peft_models.compute(base) - expected).max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "new" / "adapter")
    found = peft_models.compute(adapted)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
