"""The commands `jlora adapt` and `jlora ranks`, run in a folder of small files."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import jlora
from benchmarks.run.matrices import make_spiked
from jlora.cli.main import main

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Enter and return a folder with weights, a domain file and pairs of x and y."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    w = rng.standard_normal((20, 12)).astype(np.float32)
    jlora.save_arrays("w.npy", w)
    jlora.save_arrays("w64.npy", w.astype(np.float64))
    jlora.save_arrays(
        "many.npz", {"a/q": w, "b/q": w[:, ::-1], "bias": w[0], "k": w[:5]}
    )
    jlora.save_arrays("domain.npy", rng.standard_normal((4, 3)))

    x = rng.standard_normal((200, 20)).astype(np.float32)
    # The target stays in the span of the columns of w, so training only v can fit it.
    target = w + 0.1 * w @ rng.standard_normal((12, 12))
    np.savez("pairs.npz", x=x, y=x @ target)
    jlora.save_arrays("out.npy", np.zeros(2))
    return tmp_path


def run(text):
    return main(text.split())


def test_domain_columns(folder, capsys):
    command = "adapt w.npy -o out.npy --rank 4 --columns 3 --domain domain.npy"
    command += " --factors uv.npz"
    assert run(command) == 0

    a, out = (jlora.load_arrays(f"{name}.npy")[name] for name in ("w", "out"))
    factors = jlora.load_arrays("uv.npz")
    best = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    kept = (best[0] * best[1])[:, :4] @ best[2][:4]
    np.testing.assert_allclose(out[:, :9], kept[:, :9], atol=1e-5)

    domain = jlora.load_arrays("domain.npy")["domain"]
    np.testing.assert_allclose(out[:, 9:], factors["w.u"] @ domain, atol=1e-5)

    energy = np.sum(best[1][:4] ** 2) / np.sum(best[1] ** 2)
    printed = capsys.readouterr().out
    assert f"w: 20x12, rank 4, energy kept {energy:.4f}, relative error" in printed
    change = float(re.search(r"change in the weight (\S+)", printed)[1])
    assert change == pytest.approx(
        np.linalg.norm(out - a) / np.linalg.norm(a), rel=1e-3
    )
    assert "wrote out.npy: 1 arrays, 0 as before" in printed


def test_data_trains_v_and_keeps_the_other_arrays(folder, capsys):
    command = (
        "adapt many.npz -o out.safetensors --rank 12 --targets a/q --data pairs.npz"
    )
    assert run(f"{command} --steps 300") == 0

    old, new = jlora.load_arrays("many.npz"), jlora.load_arrays("out.safetensors")
    assert old.keys() == new.keys()
    for name in ("b/q", "bias", "k"):
        assert (old[name] == new[name]).all()

    with np.load("pairs.npz") as pairs:
        errors = [
            np.linalg.norm(pairs["x"] @ w["a/q"] - pairs["y"]) for w in (old, new)
        ]
    assert errors[1] < 0.2 * errors[0]
    assert "(20 of 200 rows)" in capsys.readouterr().out


def test_keep_residual_changes_nothing_else(folder):
    assert run(f"adapt w.npy -o out.npy --rank 4 {DOMAIN} --keep-residual") == 0
    a, out = (jlora.load_arrays(f"{name}.npy")[name] for name in ("w", "out"))
    np.testing.assert_allclose(out[:, :9], a[:, :9], atol=1e-5)


def test_float64_stays_float64(folder):
    assert run("adapt w64.npy -o out.npy --rank 12 --columns 3 --domain d12.npy") == 2
    jlora.save_arrays("d12.npy", np.zeros((12, 3)))
    assert run("adapt w64.npy -o out.npy --rank 12 --columns 3 --domain d12.npy") == 0
    a, out = jlora.load_arrays("w64.npy")["w64"], jlora.load_arrays("out.npy")["out"]
    np.testing.assert_allclose(out[:, :9], a[:, :9], rtol=0, atol=1e-13)


DOMAIN = "--columns 3 --domain domain.npy"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (
            f"none.npy -o out.npy --rank 4 {DOMAIN}",
            "none.npy: must be a file that can be opened",
        ),
        (
            f"empty.npy -o out.npy --rank 4 {DOMAIN}",
            "empty.npy: must hold arrays, got an empty",
        ),
        (
            f"short.npy -o out.npy --rank 4 {DOMAIN}",
            "short.npy: must be a whole .npy file",
        ),
        (
            f"short.npz -o out.npy --rank 4 {DOMAIN}",
            "short.npz: must be a whole .npz file",
        ),
        (
            f"short.safetensors -o out.npy --rank 4 {DOMAIN}",
            "must be a whole safetensors file",
        ),
        (f"w.bin -o out.npy --rank 4 {DOMAIN}", "w.bin: must end in .npy"),
        (f"nan.npy -o out.npy --rank 4 {DOMAIN}", "`nan` must be finite, got 1 NaN"),
        (f"ints.npy -o out.npy --rank 4 {DOMAIN}", "ints (has dtype int64"),
        (f"w.npy -o out.npy --rank 0 {DOMAIN}", "`--rank` must be at least 1, got 0"),
        (
            f"w.npy -o out.npy --rank 13 {DOMAIN}",
            "w: `rank` must be at most min(m, n) = 12",
        ),
        (
            f"w.npy -o out.npy --rank 5 {DOMAIN}",
            "domain.npy: `--domain` must be an array with",
        ),
        (f"w.npy -o out.npy --rank 4 --targets z {DOMAIN}", "pattern 'z' without one"),
        (
            f"w.npy -o out.npy --rank 4 --targets ( {DOMAIN}",
            "must be a regular expression",
        ),
        (
            f"w.npy -o missing/out.npy --rank 4 {DOMAIN}",
            "missing/out.npy: must be a file in a folder",
        ),
        (f"w.npy -o out.bin --rank 4 {DOMAIN}", "out.bin: must end in .npy"),
        (f"many.npz -o out.npy --rank 4 {DOMAIN}", "exactly one array, got 4"),
        ("w.npy -o out.npy --rank 4", "`--domain` or `--data` must say"),
        ("w.npy -o out.npy --rank 4 --columns 3", "must come together"),
        (
            "w.npy -o out.npy --rank 4 --columns 2 --domain domain.npy",
            "must have shape (4, 2)",
        ),
        (
            "w.npy -o out.npy --rank 4 --columns 13 --domain domain.npy",
            "must be at most 12",
        ),
        (
            "w.npy -o out.npy --rank 4 --data domain.npy",
            "must hold arrays named x and y",
        ),
        (
            "many.npz -o out.npz --rank 4 --data pairs.npz --targets k",
            "`k` must have shape (20,",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(folder, capsys, command, text):
    (folder / "empty.npy").touch()
    for suffix in (".npy", ".npz", ".safetensors"):
        jlora.save_arrays(f"short{suffix}", {"w": np.ones((9, 9))})
        os.truncate(f"short{suffix}", 300)
    jlora.save_arrays("nan.npy", np.where(np.eye(12) * np.arange(12) == 3, np.nan, 1.0))
    jlora.save_arrays("ints.npy", np.ones((12, 12), np.int64))

    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    assert run(f"adapt {command}") == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("jlora adapt: ")
    assert error.count("\n") == 1
    assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_debug_shows_the_traceback(folder):
    with pytest.raises(FileNotFoundError):
        run(f"adapt none.npy -o out.npy --rank 4 {DOMAIN} --debug")


def test_the_installed_command(folder):
    command = os.path.join(os.path.dirname(sys.executable), "jlora")
    done = subprocess.run(
        [command, "adapt", "none.npy", "-o", "out.npy", "--rank", "4", *DOMAIN.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

    usage = subprocess.run(
        [command, "adapt"], capture_output=True, text=True, check=False
    )
    assert usage.returncode == 2


def test_ranks_prints_the_rank_of_each_rule(folder, capsys):
    rng = np.random.default_rng(1)
    jlora.save_arrays(
        "big.npz",
        {
            "spiked": make_spiked(rng, 300, 200).astype(np.float32),
            "bias": np.ones(3, np.float32),
            "stack": np.stack([np.diag([3.0, 2.0, 0.0]), np.diag([1.0, 0.0, 0.0])]),
        },
    )
    assert run("ranks big.npz --budget 700 --multiple-of 1 --plot ranks.png") == 0

    printed = capsys.readouterr().out
    assert "spiked: 300x200, all 200 values, norm" in printed
    assert "gavish_donoho 12, marchenko_pastur 12" in printed
    assert "stack[1]: 3x3, all 3 values, norm 1, largest 1, median 0" in printed
    assert "energy 2, tail 2, gap 1" in printed.split("stack[0]")[1]
    assert re.search(
        r"budget: \d+ of 700 parameters, energy kept 0\.\d+\n  spiked: 1\n", printed
    )
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_of_a_large_matrix_come_from_its_leading_values(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr("jlora.cli.ranks._WHOLE", 100)
    a = make_spiked(np.random.default_rng(1), 300, 400).astype(np.float32)
    jlora.save_arrays("a.npy", a)
    assert run("ranks a.npy --max-rank 40") == 0
    leading = capsys.readouterr().out
    assert "a: 300x400, leading 40 of 300 values" in leading
    assert "energy 40 or more" in leading
    assert "gavish_donoho 12, marchenko_pastur 12" in leading
    assert "effective -" in leading
    assert run("ranks a.npy --max-rank 40 --exact") == 0
    assert "all 300 values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("ranks missing.npy", "missing.npy: must be a file"),
        (
            "ranks w.npy --targets (",
            "`--targets` must be a regular expression, got '('",
        ),
        ("ranks w.npy --targets zzz", "w.npy: `rules` must each match a matrix"),
        ("ranks w.npy --energy 0", "`--energy` must lie in (0, 1], got 0.0"),
        ("ranks w.npy --tolerance 1", "`--tolerance` must lie in [0, 1), got 1.0"),
        ("ranks w.npy --max-rank 0", "`--max-rank` must be at least 1"),
        ("ranks w.npy --budget 0", "`--budget` must be at least 1"),
        ("ranks w.npy --plot x.pdf", "`--plot` must end in .png, got x.pdf"),
        ("ranks nan.npy", "`nan` must be finite, got 1 NaN or Inf among 4"),
    ],
)
def test_ranks_refuses(folder, capsys, command, text):
    jlora.save_arrays("nan.npy", np.array([[1.0, np.nan], [1.0, 2.0]]))
    assert run(command) == 2
    assert text in capsys.readouterr().err
