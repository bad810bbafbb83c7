"""`initialize_checkpoint`: base and adapter add up to the model."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import (
    initial_factors,
    initialize_checkpoint,
    open_checkpoint,
    window_store,
)
from tests.helpers.killed_runs import list_bytes

KEY = jax.random.key(0)
NAMES = [f"model.layers.{i}.{name}_proj.weight" for i in range(2) for name in "qv"]


def make_model(folder, dtype=np.float32, **config):
    """Write two shards of matrices, a norm, an embedding and a head."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    places = {}
    for shard in range(2):
        arrays = {
            name: rng.standard_normal((12, 20 if "q_" in name else 16)).astype(dtype)
            for name in NAMES[2 * shard : 2 * shard + 2]
        }
        if shard == 0:
            arrays["model.norm.weight"] = np.ones(16, dtype)
            arrays["model.embed_tokens.weight"] = np.ones((30, 16), dtype)
            arrays["lm_head.weight"] = np.ones((30, 16), dtype)
        file = f"model-{shard + 1:05}-of-00002.safetensors"
        jlora.save_arrays(folder / file, arrays)
        places |= dict.fromkeys(arrays, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def initialize(*args, **settings):
    return initialize_checkpoint(*args, key=KEY, progress=False, **settings)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("method", ["pissa", "milora", "olora", "orthogonal", "lora"])
def test_base_and_delta_add_up_to_the_model(tmp_path, method, dtype):
    model = make_model(tmp_path / "model", dtype)
    report = initialize(model, tmp_path / "new", method=method, rank=4)
    factors, _ = jlora.load_peft(tmp_path / "new" / "adapter")
    assert set(factors) == {name.removesuffix(".weight") for name in NAMES}
    assert {row.rank for row in report.modules} == {4}

    has_moved = method in ("pissa", "milora", "olora")
    assert (tmp_path / "new" / "base").exists() == has_moved
    old = open_checkpoint(model)
    new = open_checkpoint(tmp_path / "new" / "base") if has_moved else old
    assert list(new) == list(old)
    # The sum is rounded once to the dtype; the files hold factors of float32.
    eps = max(float(ml_dtypes.finfo(dtype).eps), 1e-6)
    for name in old:
        delta = 0.0
        if name in NAMES:
            u, v = (np.float64(part) for part in factors[name.removesuffix(".weight")])
            delta = (u @ v).T
        else:
            assert new[name].tobytes() == old[name].tobytes()
        total = new[name].astype(np.float64) + delta
        np.testing.assert_allclose(total, np.float64(old[name]), atol=4 * eps)
    if has_moved:
        assert (tmp_path / "new" / "base" / "config.json").exists()


def test_ranks_by_energy_targets_and_conv1d(tmp_path):
    model = make_model(tmp_path / "model")
    report = initialize(
        model, tmp_path / "new", energy=0.5, targets="q_proj", portable=False
    )
    assert [row.module for row in report.modules] == [
        f"model.layers.{i}.q_proj" for i in range(2)
    ]
    for row in report.modules:
        w = open_checkpoint(model)[f"{row.module}.weight"].astype(np.float64)
        s = np.linalg.svd(w, compute_uv=False) ** 2
        assert s[: row.rank].sum() >= 0.5 * s.sum() > s[: row.rank - 1].sum()
        assert row.energy == pytest.approx(s[: row.rank].sum() / s.sum(), abs=1e-5)

    # GPT-2 stores [inputs, outputs].
    weights = {"h.0.attn.c_attn.weight": np.ones((8, 24), np.float32)}
    (tmp_path / "gpt2").mkdir()
    jlora.save_arrays(tmp_path / "gpt2" / "model.safetensors", weights)
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    initialize(tmp_path / "gpt2", tmp_path / "other", rank=2)
    factors, _ = jlora.load_peft(tmp_path / "other" / "adapter")
    assert factors["h.0.attn.c_attn"].u.shape == (8, 2)


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    initialize(model, tmp_path / "expected", rank=3)
    adapted = []
    adapt_group = initial_factors._adapt_group

    def count(source, group, *rest):
        adapted.append([ref.name for ref in group])
        if len(adapted) == 3:
            raise KeyboardInterrupt
        return adapt_group(source, group, *rest)

    monkeypatch.setattr(window_store, "_WINDOW_BYTES", 1)  # one matrix each
    monkeypatch.setattr(initial_factors, "_adapt_group", count)
    with pytest.raises(KeyboardInterrupt):
        initialize(model, tmp_path / "new", rank=3)
    assert not (tmp_path / "new").exists()
    initialize(model, tmp_path / "new", rank=3)
    assert adapted[3:] == [[name.removesuffix(".weight")] for name in NAMES[2:]]
    assert list_bytes(tmp_path / "new") == list_bytes(tmp_path / "expected")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "exactly one of them, got 0"),
        ({"rank": 2, "energy": 0.5}, "exactly one of them, got 2"),
        ({"rank": 2, "method": "corda"}, "must need no data, got 'corda'"),
        ({"rank": 2, "method": "lor"}, "`init` must be one of"),
        ({"rank": 2, "targets": "nothing"}, "got none. List the names"),
        ({"rank": 2, "targets": "norm"}, "got none. List the names"),
    ],
)
def test_refusals(tmp_path, settings, text):
    model = make_model(tmp_path / "model")
    with pytest.raises(ValueError, match=text):
        initialize(model, tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="outside of the inputs"):
        initialize(model, model / "new", rank=2)
