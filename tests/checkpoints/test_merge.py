"""`merge_checkpoint`: bits, side files, interruptions and refusals."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import merge_checkpoint, open_checkpoint

BF16 = ml_dtypes.bfloat16


def draw(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng((seed, *shape))
    return rng.standard_normal(shape).astype(dtype)


def make_base(folder, *, layers=2, size=16, dtype=BF16, **config):
    """Write a sharded folder of square and wide matrices with side files."""
    folder.mkdir()
    places = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        arrays = {
            f"model.layers.{layer}.q_proj.weight": draw(size, size, seed=layer),
            f"model.layers.{layer}.up_proj.weight": draw(3 * size, size, seed=layer),
            f"model.layers.{layer}.norm.weight": draw(size, seed=layer),
        }
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        if layer == 0:
            arrays["model.embed_tokens.weight"] = draw(20, size).astype(dtype)
            arrays["counts"] = np.arange(3)
        jlora.save_arrays(folder / file, arrays)
        places |= dict.fromkeys(arrays, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": "ü"}')
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def make_adapter(folder, *, layers=2, size=16, rank=2, seed=9):
    factors = {
        f"model.layers.{layer}.{name}": jlora.Factors(
            draw(size, rank, seed=seed + layer), draw(rank, n * size, seed=seed)
        )
        for layer in range(layers)
        for name, n in (("q_proj", 1), ("up_proj", 3))
    }
    jlora.save_peft(folder, factors)
    return folder, factors


def list_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def model(tmp_path):
    base = make_base(tmp_path / "base", model_type="llama")
    adapter, factors = make_adapter(tmp_path / "adapter")
    return base, adapter, factors, tmp_path / "out"


def merge(*args, **settings):
    return merge_checkpoint(*args, progress=False, **settings)


def test_sums_are_rounded_once_and_the_rest_keeps_its_bytes(model):
    base, adapter, factors, output = model
    before = list_bytes(base)
    report = merge(base, adapter, output)
    old, new = open_checkpoint(base), open_checkpoint(output)
    assert list(new) == list(old)
    assert (len(report.changed), report.copied) == (4, 4)

    for name in old:
        module = name.removesuffix(".weight")
        assert new.info(name).dtype == old.info(name).dtype
        if module not in factors:
            assert new[name].tobytes() == old[name].tobytes()
            continue
        u, v = (np.float64(part) for part in factors[module])
        exact = old[name].astype(np.float64) + (u @ v).T
        # One rounding to bfloat16 of sums in float32.
        eps = float(ml_dtypes.finfo(BF16).eps)
        assert (abs(new[name] - exact) <= 0.51 * eps * abs(exact) + 1e-5).all()

    # The same shards, side files byte for byte, nothing pickled, inputs unchanged.
    assert [path.name for path in new.files] == [path.name for path in old.files]
    assert list_bytes(base) == before
    names = set(before) - {"pytorch_model.bin"}
    assert set(list_bytes(output)) == names
    for name in ("config.json", "tokenizer.json"):
        assert list_bytes(output)[name] == before[name]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == old.num_bytes


def test_one_file_dtypes_and_rounding(tmp_path):
    adapter, factors = make_adapter(tmp_path / "adapter", layers=1)
    name = "model.layers.0.q_proj"
    for dtype in (np.float64, np.float32, np.float16, BF16):
        base = tmp_path / f"{np.dtype(dtype).name}.safetensors"
        w = draw(16, 16).astype(dtype)
        others = {"model.layers.0.up_proj.weight": draw(48, 16).astype(dtype)}
        jlora.save_arrays(base, {f"{name}.weight": w} | others)
        output = tmp_path / f"out {np.dtype(dtype).name}"
        merge(base, adapter, output)
        u, v = (np.float64(part) for part in factors[name])
        exact = np.float64(w) + (u @ v).T
        found = np.float64(open_checkpoint(output)[f"{name}.weight"])
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(found, exact, rtol=eps, atol=2e-6)

    # Stochastic rounding: unbiased, and the same for one key.
    outputs = [tmp_path / name for name in "abc"]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        key = jax.random.key(seed)
        merge(base, adapter, output, rounding="stochastic", key=key)
    a, b, c = (list_bytes(output) for output in outputs)
    assert a == b != c


def test_a_tied_head_keeps_its_weight(tmp_path):
    base = make_base(tmp_path / "base", architectures=["LlamaForCausalLM"])
    table = "model.embed_tokens"
    delta = jlora.Factors(draw(20, 2), draw(2, 16))
    jlora.save_peft(tmp_path / "adapter", {table: delta})
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    assert report.untied == "lm_head.weight"
    old, new = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert new["lm_head.weight"].tobytes() == old[f"{table}.weight"].tobytes()
    assert new[f"{table}.weight"].tobytes() != old[f"{table}.weight"].tobytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]


def test_a_dry_run_writes_nothing(model):
    base, adapter, _, output = model
    report = merge(base, adapter, output, dry_run=True)
    assert len(report.changed) == 4
    assert sorted(path.name for path in output.parent.iterdir()) == ["adapter", "base"]


def test_refusals(model, tmp_path):
    base, adapter, _, output = model

    def refuse(text, *args, **settings):
        with pytest.raises(ValueError, match=text):
            merge(*args, **settings)
        assert not output.exists()

    def write(name, module, u, v, **settings):
        jlora.save_peft(tmp_path / name, {module: jlora.Factors(u, v)}, **settings)
        return tmp_path / name

    q = "model.layers.0.q_proj"
    refuse("must be a folder that does not exist yet", base, adapter, adapter)
    refuse("outside of the inputs", base, adapter, base / "new")
    refuse("in a folder that can be written to", base, adapter, tmp_path / "a" / "b")
    refuse("at least one", base, [], output)
    refuse("compensated", base, adapter, output, rounding="compensated")
    other = write("other", "model.layers.7.q_proj", draw(16, 2), draw(2, 16))
    refuse(r"must hold the weight of model\.layers\.7", base, other, output)
    wide = write("wide", q, draw(8, 2), draw(2, 16))
    refuse("8 inputs and 16 outputs", base, wide, output)
    counts = write("counts", "model.layers.0.norm", draw(4, 2), draw(2, 4))
    refuse("4 inputs and 4 outputs", base, counts, output)
    huge = write("huge", q, draw(16, 2), draw(2, 16), scale=1e38)
    refuse("must stay finite in bfloat16", base, huge, output)

    eight = tmp_path / "eight.safetensors"
    jlora.save_arrays(eight, {f"{q}.weight": draw(16, 16).astype("float8_e4m3fn")})
    one = write("one", q, draw(16, 2), draw(2, 16))
    refuse("floating of 16 to 64 bits.*Dequantise", eight, one, output)


def test_two_runs_at_once(model):
    base, adapter, _, output = model
    partial = output.parent / ".out.partial"
    partial.mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a');"
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, partial / ".lock"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="one run at a time"):
            merge(base, adapter, output)
    finally:
        holder.kill()
        holder.communicate()
    merge(base, adapter, output)


MERGE = """
import sys, jlora
jlora.checkpoints.merge_checkpoint(*sys.argv[1:], progress=False)
"""


def test_a_disk_that_fills_leaves_no_result(model):
    base, adapter, _, output = model
    code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (1500, 1500))" + MERGE
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, base, adapter, output],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not output.exists()
    merge(base, adapter, output)
    assert len(open_checkpoint(output)) == 8
