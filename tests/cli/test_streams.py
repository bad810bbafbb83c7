"""Commands as processes: exit codes, streams, signals, and odd outputs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jlora.cli.main import main

COMMAND = [sys.executable, "-m", "jlora"]
ADAPT = ["adapt", "w.npz", "-o", "out.npz", "--rank", "2", "--columns", "1"]
ADAPT += ["--domain", "d.npy"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the commands read, as the current one."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((12, 9)).astype(np.float32)
    np.savez(tmp_path / "w.npz", w=w, other=w.T)
    np.save(tmp_path / "d.npy", np.ones((2, 1), np.float32))
    np.savez(tmp_path / "zero.npz", w=np.zeros((12, 9), np.float32))
    np.savez(tmp_path / "pairs.npz", x=w, y=np.zeros((12, 5), np.float32))
    np.save(tmp_path / "tall.npy", np.ones((9, 5), np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(command):
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def quote(arguments):
    return " ".join([*COMMAND, *arguments])


BAD_CALLS = {
    "one output twice": [*ADAPT, "--factors", "out.npz"],
    "one output by two names": [*ADAPT, "--factors", "./out.npz"],
    "factors over the weights": [*ADAPT, "--factors", "w.npz"],
    "output over the domain": [*ADAPT, "-o", "d.npy", "--targets", "w"],
    "output is a folder": [*ADAPT, "-o", "folder.npz"],
    "output is a pipe": [*ADAPT, "-o", "pipe.npz"],
    "output is a link to a device": [*ADAPT, "-o", "device.npz"],
    "output in no folder": [*ADAPT, "-o", "missing/out.npz"],
    "factors that .npy cannot hold": [*ADAPT, "--factors", "f.npy"],
    "seed of 70 bits": [*ADAPT, "--seed", str(2**70)],
    "negative seed": [*ADAPT, "--seed", "-1"],
    "missing weights": ["ranks", "missing.npz"],
    "weights are a folder": ["ranks", "folder.npz"],
    "weights are a device": ["ranks", "zero.npy"],
    "budget of zero": ["ranks", "w.npz", "--budget", "0"],
    "seed of ranks": ["ranks", "w.npz", "--seed", str(2**33)],
    "no such target": ["ranks", "w.npz", "--targets", "nothing"],
    "bad expression": ["ranks", "w.npz", "--targets", "("],
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_before_any_work(folder, name, capsys):
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    (folder / "device.npz").symlink_to("/dev/null")
    (folder / "zero.npy").symlink_to("/dev/zero")
    before = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}

    assert main(BAD_CALLS[name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jlora ")
    assert err.count("\n") == 1
    after = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
    assert after == before


def test_in_place_is_allowed(folder):
    assert main([*ADAPT, "-o", "w.npz"]) == 0


def test_a_zero_matrix_has_numbers(folder, capsys):
    assert main(["ranks", "zero.npz", "--budget", "100"]) == 0
    out, _ = capsys.readouterr()
    assert "nan" not in out
    arguments = ["adapt", "tall.npy", "-o", "out.npz", "--rank", "2", "--steps", "5"]
    np.savez(
        "zeros.npz", x=np.ones((20, 9), np.float32), y=np.zeros((20, 5), np.float32)
    )
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        code = main([*arguments, "--data", "zeros.npz"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "inf" not in out
    assert "nan" not in out


def test_a_huge_budget_buys_everything(folder, capsys):
    assert main(["ranks", "w.npz", "--budget", str(10**30)]) == 0
    assert "energy kept 1.000" in capsys.readouterr().out


def test_control_characters_in_names_are_escaped(folder, capsys):
    np.savez("n.npz", **{"a\x1b[2Jb\nc": np.ones((5, 4), np.float32)})
    assert main(["ranks", "n.npz"]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out
    assert "a\\x1b[2Jb\\nc" in out


def test_a_reader_that_leaves_is_no_error(folder):
    found = run_shell(f"{quote(['ranks', 'w.npz'])} | head -1; echo ${{PIPESTATUS[0]}}")
    assert found.stderr == ""
    assert "norm" in found.stdout

    # The result is written although nobody reads the report.
    found = run_shell(f"{quote(ADAPT)} | true")
    assert found.stderr == ""
    assert (folder / "out.npz").exists()


def test_streams_that_are_closed_or_narrow(folder):
    found = run_shell(f"{quote(['ranks', 'missing.npz'])} 2>&-")
    assert (found.returncode, found.stdout) == (2, "")

    np.savez("n.npz", **{"größe": np.ones((5, 4), np.float32)})
    found = run_shell(f"PYTHONIOENCODING=ascii {quote(['ranks', 'n.npz'])}")
    assert (found.returncode, found.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in found.stdout


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_an_interrupt_of_the_imports_ends_with_130(folder, delay):
    process = subprocess.Popen(
        [*COMMAND, "demo"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The libraries of JAX are loaded while jlora is imported.
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.count("\n") <= 1
