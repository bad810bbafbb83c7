"""`initialize_checkpoint(quantize=)`: base and adapter of a quantised model."""

import json

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints import initialize_checkpoint, load_weights
from jlora.cli.main import main
from jlora.quantization import QuantizedArray, int8, nf4
from tests.helpers.killed_runs import list_bytes

KEY = jax.random.key(0)


def write_model(folder, inputs=128, num_files=1):
    """Write a model; by default its matrices have whole blocks of NF4."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        f"model.layers.{i}.{name}_proj.weight": rng.standard_normal((24, inputs))
        for i in range(2)
        for name in "qv"
    }
    arrays |= {"lm_head.weight": rng.standard_normal((30, inputs)), "norm": np.ones(5)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    names, places = sorted(arrays), {}
    for number in range(num_files):
        file = f"part-{number}.safetensors" if num_files > 1 else "model.safetensors"
        part = names[number::num_files]
        jlora.save_arrays(folder / file, {name: arrays[name] for name in part})
        places |= dict.fromkeys(part, file)
    if num_files > 1:
        index = json.dumps({"weight_map": places})
        (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text(json.dumps({"hidden_size": inputs}))
    return arrays


@pytest.mark.parametrize("format", ["nf4", "int8", "int4", "fp8"])
@pytest.mark.parametrize("method", ["lora", "pissa", "loftq"])
def test_base_and_delta_are_near_the_model(tmp_path, format, method):
    arrays = write_model(tmp_path / "model")
    new = tmp_path / "new"
    initialize_checkpoint(
        tmp_path / "model",
        new,
        method=method,
        rank=4,
        quantize=format,
        key=KEY,
        progress=False,
    )
    found = load_weights(new / "base")
    assert found.keys() == arrays.keys()
    factors, _ = jlora.load_peft(new / "adapter")
    # The errors of a Gaussian matrix that the docstrings of the formats state.
    limits = {"nf4": 0.1, "int8": 0.01, "int4": 0.11, "fp8": 0.03}
    for name, array in arrays.items():
        if "_proj" not in name:
            np.testing.assert_array_equal(found[name], array)
            continue
        base = found[name]
        assert isinstance(base, QuantizedArray)
        assert base.format.name == format
        u, v = factors[name.removesuffix(".weight")]
        total = np.asarray(base.dequantize()) + (u @ v).T
        error = np.linalg.norm(total - array) / np.linalg.norm(array)
        assert error < limits[format]

    config = json.loads((new / "base" / "config.json").read_text())
    is_foreign = format in ("nf4", "int8")
    assert ("quantization_config" in config) == is_foreign
    if is_foreign:
        settings = config["quantization_config"]
        assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_shards_keep_their_index_and_sizes_without_blocks_their_own_scheme(tmp_path):
    arrays = write_model(tmp_path / "model", inputs=20, num_files=2)
    initialize_checkpoint(
        tmp_path / "model",
        tmp_path / "new",
        rank=4,
        quantize="nf4",
        key=KEY,
        progress=False,
    )
    index = json.loads(
        (tmp_path / "new" / "base" / "model.safetensors.index.json").read_text()
    )
    stored = jlora.checkpoints.open_checkpoint(tmp_path / "new" / "base")
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == stored.num_bytes
    found = load_weights(tmp_path / "new" / "base")
    for name in arrays:
        assert isinstance(found[name], QuantizedArray) == ("_proj" in name)
    # 20 inputs are no whole blocks: bitsandbytes could not hold them.
    config = json.loads((tmp_path / "new" / "base" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_command_writes_the_same_files(tmp_path):
    write_model(tmp_path / "model")
    settings = {"rank": 4, "quantize": int8(), "key": KEY, "progress": False}
    initialize_checkpoint(tmp_path / "model", tmp_path / "a", **settings)
    words = ["init", str(tmp_path / "model"), "--rank", "4", "--quantize", "int8"]
    assert main([*words, "-o", str(tmp_path / "b")]) in (None, 0)
    assert list_bytes(tmp_path / "a") == list_bytes(tmp_path / "b")


def test_bad_formats_are_refused_before_anything_is_written(tmp_path):
    arrays = write_model(tmp_path / "model")
    settings = {"rank": 4, "key": KEY, "progress": False}
    with pytest.raises(ValueError, match="`quantize` must be one of"):
        initialize_checkpoint(
            tmp_path / "model", tmp_path / "new", quantize="nf3", **settings
        )
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    jlora.save_arrays(tmp_path / "wide.safetensors", wide)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 to be quant"):
        initialize_checkpoint(
            tmp_path / "wide.safetensors", tmp_path / "new", quantize=nf4(), **settings
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_transformers_and_peft_load_base_and_adapter(tmp_path, format):
    """The road to PyTorch: a QPiSSA base with its adapter, run by bitsandbytes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=300,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    new = tmp_path / "new"
    initialize_checkpoint(
        tmp_path / "model", new, rank=8, quantize=format, key=KEY, progress=False
    )

    load = transformers.LlamaForCausalLM.from_pretrained
    loaded = peft.PeftModel.from_pretrained(
        load(new / "base", dtype=torch.float32), new / "adapter"
    )
    projection = loaded.base_model.model.model.layers[0].mlp.up_proj
    assert "bit" in type(projection).__name__.lower()

    # The same weights, put together here, in the plain model.
    weights = load_weights(new / "base")
    factors, _ = jlora.load_peft(new / "adapter")
    state = {
        name: torch.tensor(np.asarray(_merge(name, array, factors), np.float32))
        for name, array in weights.items()
    }
    model.load_state_dict(state)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        found, expected = loaded(tokens).logits.float(), model(tokens).logits
    # bitsandbytes rounds activations to 8 bits for int8, to 16 bits for NF4.
    limit = {"nf4": 0.01, "int8": 0.03}[format]
    assert float((found - expected).norm() / expected.norm()) < limit


def _merge(name, array, factors):
    if not isinstance(array, QuantizedArray):
        return array
    u, v = factors[name.removesuffix(".weight")]
    return np.asarray(array.dequantize(np.float32)) + (u @ v).T
