"""Adapters in PEFT's files: what is written, and what is read or refused."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora import Factors
from jlora.checkpoints import read_peft
from jlora.checkpoints.peft_config import find_scale

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"


def draw(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return rng.standard_normal(shape).astype(np.float32)


def make_factors(rank=2, m=6, n=4, seed=0):
    return Factors(draw(m, rank, seed=seed), draw(rank, n, seed=seed))


def multiply(factors):
    return np.asarray(factors.u, np.float64) @ np.asarray(factors.v, np.float64)


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(entries | config))
    jlora.save_arrays(folder / "adapter_model.safetensors", tensors)
    return folder


def name(module, side, end=".weight"):
    return f"base_model.model.{module}.lora_{side}{end}"


def make_tensors(module=Q, rank=2):
    factors = make_factors(rank)
    pair = (np.ascontiguousarray(part.T) for part in factors)
    return dict(zip((name(module, "A"), name(module, "B")), pair, strict=True))


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("scale", [1.0, -0.3, {Q: 2.0, UP + ".weight": 0.0}])
def test_what_is_saved_is_loaded(tmp_path, portable, scale):
    factors = {Q: make_factors(2), UP + ".weight": make_factors(3, seed=1)}
    folder = tmp_path / "adapter"
    jlora.save_peft(folder, factors, scale=scale, portable=portable)
    found, config = jlora.load_peft(folder)
    assert set(found) == {Q, UP}
    for path, module in ((Q, Q), (UP + ".weight", UP)):
        own = scale[path] if isinstance(scale, dict) else scale
        # Three float32 roundings: of the root, of u and of v.
        np.testing.assert_allclose(
            multiply(found[module]), own * multiply(factors[path]), atol=1e-6
        )

    ranks = [found[module].u.shape[-1] for module in (Q, UP)]
    assert ranks == ([3, 3] if portable else [2, 3])
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert bool(config["rank_pattern"]) is not portable
    assert config["init_lora_weights"] is True
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_names_and_orientation_of_the_tensors(tmp_path):
    table = "transformer.wte"
    factors = {Q: make_factors(), table: make_factors(m=9)}
    jlora.save_peft(tmp_path, factors, config={"task_type": "CAUSAL_LM"})
    tensors = jlora.load_arrays(tmp_path / "adapter_model.safetensors")
    u, v = factors[Q]
    assert np.array_equal(tensors[name(Q, "A")], u.T)
    assert np.array_equal(tensors[name(Q, "B")], v.T)
    assert tensors[name(table, "embedding_A", "")].shape == (2, 9)
    assert set(jlora.load_peft(tmp_path)[0]) == {Q, table}
    assert jlora.load_peft(tmp_path)[1]["task_type"] == "CAUSAL_LM"


def test_dtypes_are_kept(tmp_path):
    half = Factors(*(jnp.asarray(part, jnp.bfloat16) for part in make_factors()))
    wide = Factors(*(np.asarray(part, np.float64) for part in make_factors()))
    jlora.save_peft(tmp_path, {"half": half, "wide": wide})
    found, _ = jlora.load_peft(tmp_path)
    assert found["half"].u.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found["half"].v, np.asarray(half.v))
    assert found["wide"].u.dtype == np.float32


def test_experts_are_stacked_as_peft_does(tmp_path):
    factors = {
        f"model.layers.0.mlp.experts.{end}": Factors(
            draw(3, 6, 2, seed=i), draw(3, 2, 4 + i, seed=i)
        )
        for i, end in enumerate(("gate_up_proj", "down_proj"))
    }
    jlora.save_peft(tmp_path, factors)
    tensors = jlora.load_arrays(tmp_path / "adapter_model.safetensors")
    module = "model.layers.0.mlp.experts"
    assert tensors[name(f"{module}.base_layer", "A")].shape == (6, 6)
    assert tensors[name(module, "B")].shape == (5, 6)
    found, config = jlora.load_peft(tmp_path)
    assert config["target_parameters"] == list(factors)
    for path, pair in factors.items():
        assert np.array_equal(found[path].u, pair.u)
        assert np.array_equal(found[path].v, pair.v)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / np.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 5}}, 2.5),
        ({"alpha_pattern": {"q.proj": 5}}, 2.5),  # a dot is any character
        ({"alpha_pattern": {"proj": 5}}, 1.0),  # whole names only
        ({"alpha_pattern": {"self_attn.q_proj": 4, "^" + Q: 8}}, 2.0),  # the first
        ({"rank_pattern": {"q_proj": 2}, "r": 9, "lora_alpha": 9}, 4.5),
        ({"layers_to_transform": 0}, 1.0),
        ({"exclude_modules": ["k_proj"]}, 1.0),
        ({"fan_in_fan_out": True}, 1.0),
    ],
)
def test_the_scale_follows_the_rules_of_peft(tmp_path, config, scale):
    write_adapter(tmp_path, make_tensors(), **config)
    found, _ = jlora.load_peft(tmp_path)
    expected = scale * multiply(make_factors())
    np.testing.assert_allclose(multiply(found[Q]), expected, atol=1e-5)


def test_odd_names_of_tensors(tmp_path):
    tensors = make_tensors()
    odd = {
        name(Q, "A", ".default.weight"): tensors[name(Q, "A")],
        f"{Q}.lora_B.weight": tensors[name(Q, "B")],  # without the prefix
        "base_model.model.lm_head.base_layer.weight": draw(5, 6),  # of the base
    }
    found, _ = jlora.load_peft(write_adapter(tmp_path, odd))
    assert list(found) == [Q]


def test_parts_that_are_no_factors(tmp_path):
    parts = {
        "base_model.model.lm_head.weight": ("saved", "lm_head.weight"),
        "base_model.model.a.base_layer.bias": ("saved", "a.bias"),
        f"base_model.model.{Q}.lora_magnitude_vector": ("magnitudes", Q),
        name(Q, "B", ".bias"): ("biases", Q),
        "base_model.model.wte.token_adapter.trainable_tokens_delta": ("tokens", "wte"),
    }
    for tensor, (field, module) in parts.items():
        write_adapter(tmp_path, make_tensors() | {tensor: draw(4)}, lora_alpha=4)
        with pytest.raises(ValueError, match=f"factors only, got .*{module}"):
            jlora.load_peft(tmp_path)
        found = getattr(read_peft(tmp_path), field)
        expected = 2 * draw(4) if field == "biases" else draw(4)
        assert np.array_equal(found[module], expected)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, "`peft_type` must be 'LORA', got 'IA3'"),
        ({"lora_alpha": "8"}, "`lora_alpha` must be a number above 0, got '8'"),
        ({"lora_alpha": None}, "`lora_alpha` must be a number"),
        ({"r": 2.5}, "`r` must be a whole number above 0, got 2.5"),
        ({"r": True}, "`r` must be a whole number"),
        ({"r": 3}, "of the rank in adapter_config.json, 3 for"),
        ({"rank_pattern": {"q_proj": 4}}, "4 for model.layers.0.self_attn.q_proj"),
        ({"rank_pattern": [1]}, "`rank_pattern` must be an object"),
        ({"alpha_pattern": {"(": 1}}, "regular expressions, got"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "that end soon"),
        ({"alpha_pattern": {".*a.*b.*c.*d.*e": 1}}, "that end soon"),
        ({"init_lora_weights": "pissa_niter_16"}, "leaves the base unchanged"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, text):
    write_adapter(tmp_path, make_tensors(), **config)
    with pytest.raises(ValueError, match=text):
        jlora.load_peft(tmp_path)


def test_tensors_that_are_refused(tmp_path):
    good = make_tensors()
    a, b = name(Q, "A"), name(Q, "B")
    bad = good[b].copy()
    bad[0, 0] = np.nan
    cases = [
        ({a: good[a]}, f"both factors of {Q}, got only lora_A"),
        ({a: good[a], b: bad}, "must be finite, got NaN or Inf in .*lora_B"),
        ({a: np.zeros((0,), np.float32), b: good[b]}, "gathered, got shape"),
        ({a: good[a].astype(np.int32), b: good[b]}, "floating tensors"),
        ({a: good[a][:1], b: good[b]}, "of the rank in adapter_config"),
        ({a: good[a][None], b: good[b]}, "two axes"),
        ({f"{Q}.lora_A.x.weight": good[a]} | good, "must hold one adapter"),
        ({"base_model.model.x.base_layer.weight": good[a]}, "factors, got none"),
    ]
    for tensors, text in cases:
        write_adapter(tmp_path, tensors)
        with pytest.raises(ValueError, match=text):
            jlora.load_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        jlora.load_peft(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled"):
        jlora.load_peft(tmp_path)


@pytest.mark.parametrize(
    ("factors", "settings", "text"),
    [
        ({}, {}, "must hold at least one pair"),
        ({"layers/0/q": make_factors()}, {}, "paths of modules such as"),
        ({"../q": make_factors()}, {}, "paths of modules"),
        ({"q": make_factors(), "q.weight": make_factors()}, {}, "each module once"),
        ({"q": Factors(draw(2, 2) * np.nan, draw(2, 2))}, {}, "NaN or Inf in q.u"),
        ({"q": make_factors()}, {"scale": np.inf}, "`scale` must be finite"),
        ({"q": make_factors()}, {"scale": {"k": 1.0}}, "difference at 'k'"),
    ],
)
def test_factors_that_are_not_written(tmp_path, factors, settings, text):
    with pytest.raises(ValueError, match=text):
        jlora.save_peft(tmp_path / "new", factors, **settings)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_not_written(tmp_path):
    factors = {Q: make_factors()}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a folder or a new path, got a file"):
        jlora.save_peft(tmp_path / "file", factors)
    with pytest.raises(ValueError, match="a folder that exists"):
        jlora.save_peft(tmp_path / "a" / "b", factors)

    # An adapter that is there is replaced, and what lies beside it stays.
    jlora.save_peft(tmp_path / "new", factors)
    (tmp_path / "new" / "README.md").write_text("text")
    jlora.save_peft(tmp_path / "new", factors, scale=2.0)
    found, _ = jlora.load_peft(tmp_path / "new")
    np.testing.assert_allclose(multiply(found[Q]), 2 * multiply(factors[Q]), atol=1e-6)
    assert (tmp_path / "new" / "README.md").exists()


def test_scale_needs_no_pattern():
    assert find_scale({"lora_alpha": 16}, "x", 4) == 4.0
    assert find_scale({}, "x", 8) == 1.0
