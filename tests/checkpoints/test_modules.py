"""The weights of model families as modules: paths, tensors, layouts, and experts."""

import json

import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import modules
from jlora.checkpoints.folders import read_model_config


def open_model(folder, names, **config):
    """Return an open model whose tensors [4, 6] have these names, and its modules."""
    arrays = names
    if not isinstance(names, dict):
        arrays = {name: np.ones((4, 6), np.float32) for name in names}
    folder.mkdir()
    jlora.save_arrays(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = jlora.checkpoints.open_checkpoint(folder)
    settings = read_model_config(folder)
    return checkpoint, *modules.list_modules(checkpoint, settings, {})


# One row for each difference: (model_type, tensor in the file, module, layout).
NAMES = [
    ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj", "oi"),
    ("qwen3", "model.layers.0.self_attn.q_proj.weight", "=", "oi"),
    ("gemma3_text", "model.embed_tokens.weight", "=", "io"),
    ("gpt2", "transformer.h.0.attn.c_attn.weight", "=", "io"),
    ("gpt2", "h.0.mlp.c_proj.weight", "=", "io"),
    ("gpt2", "wte.weight", "=", "io"),
    ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", "=", "oi"),
    ("gpt_neox", "embed_out.weight", "lm_head", "oi"),
    ("bert", "bert.encoder.layer.0.attention.output.dense.weight", "=", "oi"),
    ("bert", "encoder.layer.3.intermediate.dense.weight", "=", "oi"),
    ("bert", "embeddings.word_embeddings.weight", "=", "io"),
    ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", "=", "oi"),
    ("t5", "shared.weight", "=", "io"),
    (
        "vit",
        "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.layers.0.attention.q_proj",
        "oi",
    ),
    (
        "vit",
        "encoder.layer.11.output.dense.weight",
        "layers.11.mlp.fc2",
        "oi",
    ),
    (
        "mixtral",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.mlp.gate",
        "oi",
    ),
    (None, "params.Dense_0.kernel", "=", "io"),
]


@pytest.mark.parametrize(("model_type", "tensor", "path", "layout"), NAMES)
def test_names_and_layouts(tmp_path, model_type, tensor, path, layout):
    _, found, reasons = open_model(tmp_path / "m", [tensor], model_type=model_type)
    (module,) = found
    assert module.path == (tensor.removesuffix(".weight") if path == "=" else path)
    assert module.layout == layout
    assert module.shape == ((4, 6) if layout == "io" else (6, 4))
    assert not reasons


def test_the_user_decides_the_layout_first(tmp_path):
    checkpoint, *_ = open_model(tmp_path / "m", ["a.weight", "b.weight", "wte.weight"])
    layouts = {r"^a\.weight$": "io", "wte": "oi", "a": "oi"}
    found, _ = modules.list_modules(checkpoint, {}, layouts)
    assert [module.layout for module in found] == ["io", "oi", "oi"]


@pytest.mark.parametrize(
    ("template", "parts", "paths"),
    [
        (
            "model.layers.0.block_sparse_moe.experts.{}.{}.weight",
            ("w1", "w2", "w3"),
            "model.layers.0.mlp.experts",
        ),
        (
            "model.layers.0.mlp.experts.{}.{}.weight",
            ("gate_proj", "down_proj", "up_proj"),
            "model.layers.0.mlp.experts",
        ),
    ],
)
def test_experts_are_stacks(tmp_path, template, parts, paths):
    rng = np.random.default_rng(0)
    gate, down, up = parts
    arrays = {
        template.format(i, part): rng.standard_normal(
            (5, 7) if part != down else (7, 5)
        )
        for i in range(12)
        for part in parts
    }
    checkpoint, found, reasons = open_model(tmp_path / "m", arrays)
    shapes = {module.path: (module.num_experts, module.shape) for module in found}
    assert shapes == {
        f"{paths}.gate_up_proj": (12, (7, 10)),
        f"{paths}.down_proj": (12, (5, 7)),
    }
    assert not reasons
    for module in found:
        names = (gate, up) if "gate" in module.path else (down,)
        for i in (0, 2, 11):
            ref = modules.MatrixRef(module, i)
            expected = np.concatenate([arrays[template.format(i, n)] for n in names])
            np.testing.assert_array_equal(
                modules.read_matrix(checkpoint, ref), expected
            )
            rows = modules.read_rows(checkpoint, ref, 3, 6)
            np.testing.assert_array_equal(rows, expected[3:6])


def test_stacked_parameters_and_experts_that_are_not_complete(tmp_path):
    stack = np.arange(24.0, dtype=np.float32).reshape(3, 2, 4)
    arrays = {
        "model.layers.0.mlp.experts.gate_up_proj": stack,
        "model.layers.1.mlp.experts.0.up_proj.weight": np.ones((5, 7)),
        "model.layers.1.mlp.experts.0.gate_proj.weight": np.ones((5, 7)),
        "model.layers.1.mlp.experts.2.up_proj.weight": np.ones((5, 7)),
        "model.layers.2.mlp.experts.0.strange.weight": np.ones((5, 7)),
        "conv.weight": np.ones((2, 3, 4)),
        "counts.weight": np.ones((2, 3), np.int32),
        "bias": np.ones(3),
    }
    checkpoint, found, reasons = open_model(tmp_path / "m", arrays)
    (module,) = found
    assert (module.num_experts, module.shape, module.layout) == (3, (4, 2), "oi")
    ref = modules.MatrixRef(module, 1)
    np.testing.assert_array_equal(
        modules.read_rows(checkpoint, ref, 1, 2), stack[1, 1:]
    )
    assert set(reasons) == set(arrays) - {module.path}
    assert "not complete" in reasons["model.layers.1.mlp.experts.0.up_proj.weight"]
    assert "not known" in reasons["model.layers.2.mlp.experts.0.strange.weight"]
    assert "no matrix" in reasons["conv.weight"]
    assert "int32" in reasons["counts.weight"]

    _, (module,), _ = open_model(
        tmp_path / "gpt", {"m.experts.down_proj": stack}, model_type="gpt_oss"
    )
    assert (module.layout, module.shape) == ("io", (2, 4))


def test_fp8_is_read_with_its_scale(tmp_path):
    values = np.array([[1, 2], [3, 4]], ml_dtypes.float8_e4m3fn)
    scale = np.array([[2.0], [4.0]], np.float32)
    arrays = {"q.weight": values, "q.weight_scale": scale}
    checkpoint, (module,), reasons = open_model(tmp_path / "m", arrays)
    assert not reasons
    found = modules.read_matrix(checkpoint, modules.MatrixRef(module, 0))
    assert found.tolist() == [[2, 4], [12, 16]]


def test_default_targets_leave_out_embeddings_heads_and_routers(tmp_path):
    names = [
        "embed_tokens",
        "lm_head",
        "layers.0.mlp.gate",
        "score",
        "layers.0.q_proj",
        "layers.0.mlp.gate_proj",
    ]
    _, found, _ = open_model(tmp_path / "m", [f"{name}.weight" for name in names])
    chosen = [m.path for m in found if modules.is_target(m, None)]
    assert chosen == ["layers.0.mlp.gate_proj", "layers.0.q_proj"]
    assert [m.path for m in found if modules.is_target(m, r"^score\.weight$")] == [
        "score"
    ]
