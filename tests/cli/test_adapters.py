"""`jlora show, merge, resize, combine, extract`: what they print, and bad calls."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.cli.main import main


def draw(*shape):
    rng = np.random.default_rng(shape)
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    weights = {"layers.0.q_proj.weight": draw(24, 16), "norm.weight": draw(16)}
    jlora.save_arrays("base/model.safetensors", weights)
    (tmp_path / "base" / "config.json").write_text("{}")
    delta = jlora.Factors(jnp.asarray(draw(16, 4)), jnp.asarray(draw(4, 24)))
    jlora.save_peft("adapter", {"layers.0.q_proj": delta})
    return tmp_path


def run(line):
    return main([*line.split()])


def test_the_road_of_an_adapter(folders, capsys):
    assert run("merge base adapter=0.5 -o merged --dry-run") == 0
    assert "would write merged: 1 tensors merged, 1 copied" in capsys.readouterr().out
    assert not (folders / "merged").exists()
    assert run("merge base adapter=0.5 -o merged") == 0
    assert run("extract base merged -o found --rank 4") == 0
    assert "layers.0.q_proj  16           4     1.0000" in capsys.readouterr().out
    assert run("init base -o new --rank 2 --method pissa") == 0
    assert "layers.0.q_proj  16           2" in capsys.readouterr().out
    assert sorted(path.name for path in (folders / "new").iterdir()) == [
        "adapter",
        "base",
    ]
    assert run("resize found -o small --energy 0.5 --keep-ranks") == 0
    assert run("combine small adapter=-0.25 -o sum --rank 3") == 0
    assert "wrote sum: 1 modules" in capsys.readouterr().out

    for path, text in {
        "base": "layers.0.q_proj.weight  24×16  float32  1536   model.safetensors",
        "base/model.safetensors": "2 arrays, 1600 bytes, 1 files",
        "adapter": "layers.0.q_proj  16      24       4     1      float32",
    }.items():
        assert run(f"show {path}") == 0
        assert text in capsys.readouterr().out


def test_numpy_files_are_shown(folders, capsys):
    jlora.save_arrays("w.npz", {"w": np.ones((2, 3))})
    assert run("show w.npz") == 0
    assert "2×3    float64  48" in capsys.readouterr().out


BAD = {
    "show gone": "gone: must be a file that can be opened",
    "show empty": "one index or one .safetensors file",
    "show broken": "must be a JSON file",
    "merge base gone -o new": "must be a file that can be opened",
    "merge base adapter=x -o new": "PATH or PATH=NUMBER",
    "merge base adapter=nan -o new": "PATH or PATH=NUMBER",
    "merge base adapter adapter=2 -o new": "each folder once",
    "merge base adapter -o adapter": "must be a folder that does not exist yet",
    "merge base adapter -o base/new": "outside of the inputs",
    "merge base/config.json adapter -o new": "must be a .safetensors file",
    "merge base adapter -o new --seed -1": "`--seed` must",
    "init base -o new --rank 2 --method eva": "must need no data",
    "init base -o new --rank 2 --targets (": "`--targets` must",
    "init base -o new --rank 2 --targets x": "got none",
    "resize adapter -o new --rank 0": "`rank` must be at least 1",
    "resize adapter -o new --energy 2": "`energy` must",
    "resize base -o new --rank 2": "must be a file that can be opened",
    "combine adapter -o /dev/null": "does not exist yet, got a device",
    "extract base base -o new --rank 2": "got no difference",
    "extract base adapter -o new --rank 2": "no difference",
    "extract base base -o new --rank 2 --targets (": "`--targets` must",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_call_prints_one_line(folders, capsys, line):
    (folders / "empty").mkdir()
    (folders / "broken").mkdir()
    (folders / "broken" / "adapter_config.json").write_text("{")
    before = sorted(path.name for path in folders.iterdir())
    assert run(line) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert BAD[line] in message
    assert "Traceback" not in captured.err
    assert "an error of jlora itself" not in message
    assert sorted(path.name for path in folders.iterdir()) == before


def test_as_a_program(folders):
    command = [sys.executable, "-m", "jlora", "show", "base"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "norm.weight" in done.stdout
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 1}))
    command = [sys.executable, "-m", "jlora", "merge", "base", "adapter", "-o", "new"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "`peft_type` must be 'LORA'" in done.stderr
