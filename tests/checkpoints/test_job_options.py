"""Options that the jobs share: dry runs, limits of memory, layouts, budgets."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import (
    combine_adapters,
    extract_checkpoint,
    initialize_checkpoint,
    merge_checkpoint,
    open_checkpoint,
    resize_adapter,
)
from tests.helpers.model_folders import MODULES, write_adapter, write_model

KEY = jax.random.key(0)


@pytest.fixture
def inputs(tmp_path):
    return (
        write_model(tmp_path / "base"),
        write_model(tmp_path / "tuned", seed=1),
        write_adapter(tmp_path / "adapter"),
    )


def run_job(job, inputs, output, **settings):
    base, tuned, adapter = inputs
    settings = {"progress": False} | settings
    if job == "extract":
        return extract_checkpoint(base, tuned, output, key=KEY, **settings)
    if job == "init":
        return initialize_checkpoint(base, output, key=KEY, **settings)
    if job == "resize":
        return resize_adapter(adapter, output, **settings)
    return combine_adapters({adapter: 0.5}, output, **settings)


JOBS = ("extract", "init", "resize", "combine")


@pytest.mark.parametrize("job", JOBS)
def test_a_dry_run_gives_the_largest_ranks_and_writes_nothing(inputs, tmp_path, job):
    before = sorted(path.name for path in tmp_path.iterdir())
    report = run_job(job, inputs, tmp_path / "new", rank=2, dry_run=True)
    assert [(row.module, row.rank) for row in report.modules] == [
        (module, 2) for module in MODULES
    ]
    assert all(np.isnan(row.energy) for row in report.modules)
    assert str(report).splitlines()[1].split()[-2:] == ["-", "-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="does not exist yet"):
        run_job(job, inputs, inputs[0], rank=2, dry_run=True)

    report = run_job(job, inputs, tmp_path / "new", rank=2)
    assert [row.rank for row in report.modules] == [2, 2]


def test_a_limit_of_memory_is_checked_first(tmp_path):
    # Matrices of one row that stand for much, without their bytes on the disk.
    name, size = "layers.0.q_proj.weight", 2**27
    for kind in ("base", "tuned"):
        (tmp_path / kind).mkdir()
        header = {
            "dtype": "F32",
            "shape": [2**10, 2**17],
            "data_offsets": [0, 4 * size],
        }
        text = json.dumps({name: header}).encode()
        with open(tmp_path / kind / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 4 * size)
    adapter = write_adapter(tmp_path / "adapter")
    inputs = (tmp_path / "base", tmp_path / "tuned", adapter)

    for job in ("extract", "init"):
        with pytest.raises(
            ValueError, match=r"q_proj: `max_memory` must hold the work"
        ):
            run_job(job, inputs, tmp_path / "new", rank=2, max_memory=2**30)
        with pytest.raises(ValueError, match="`max_memory` must be at least"):
            run_job(job, inputs, tmp_path / "new", rank=2, max_memory=2**20)
        report = run_job(
            job, inputs, tmp_path / "new", rank=2, max_memory=2**32, dry_run=True
        )
        assert len(report.modules) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("job", JOBS)
def test_the_limit_does_not_change_the_result(inputs, tmp_path, job):
    for name, limit in (("one", None), ("two", 2**30)):
        run_job(job, inputs, tmp_path / name, rank=2, max_memory=limit)
    files = sorted((tmp_path / "one").rglob("*.safetensors"))
    assert files
    for path in files:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()


def test_lines_of_progress_say_matrices_bytes_and_time(inputs, tmp_path, capsys):
    for job, name in (("extract", "extract"), ("init", "init"), ("resize", "resize")):
        run_job(job, inputs, tmp_path / job, rank=2, progress=None)
        line = next(
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith(f"{name}: 2/2 matrices")
        )
        assert re.search(r", \d+ MB/s, 0 s left, \d+\.\d matrices/s$", line)


def test_ranks_of_init_come_from_a_budget(inputs, tmp_path):
    report = run_job("init", inputs, tmp_path / "new", budget=40, portable=False)
    spent = sum(11 * row.rank for row in report.modules)
    assert 30 <= spent <= 40
    factors, _ = jlora.load_peft(tmp_path / "new" / "adapter")
    base = open_checkpoint(inputs[0])
    moved = open_checkpoint(tmp_path / "new" / "base")
    for module in MODULES:
        delta = (factors[module].u @ factors[module].v).T if module in factors else 0
        np.testing.assert_allclose(
            moved[f"{module}.weight"] + delta, base[f"{module}.weight"], atol=1e-6
        )


def test_layouts_of_unknown_models(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (5, 8), "square.weight": (6, 6)}
    old = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    u = {name: rng.standard_normal((shape[0], 1)) for name, shape in shapes.items()}
    new = {name: w + u[name] @ np.ones((1, w.shape[1])) for name, w in old.items()}
    for name, arrays in (("old", old), ("new", new)):
        jlora.save_arrays(tmp_path / f"{name}.safetensors", arrays)
    paths = [tmp_path / f"{name}.safetensors" for name in ("old", "new")]

    for number, layout in enumerate(("io", "oi")):
        output = tmp_path / str(number)
        run_job("extract", (*paths, None), output, rank=1, layouts={".*": layout})
        factors, _ = jlora.load_peft(output)
        assert factors["up"].u.shape == ((5, 1) if layout == "io" else (8, 1))
        # The way back needs the same layout: a square matrix has both.
        merged = tmp_path / f"merged-{number}"
        merge_checkpoint(
            paths[0], output, merged, layouts={".*": layout}, progress=False
        )
        for name, w in new.items():
            np.testing.assert_allclose(open_checkpoint(merged)[name], w, atol=1e-5)
    with pytest.raises(ValueError, match="must hold a weight of 5 inputs"):
        merge_checkpoint(paths[0], tmp_path / "0", tmp_path / "x", layouts={".*": "oi"})
    for layouts, text in (({"(": "oi"}, "regular expr"), ({"a": "b"}, "'io' or 'oi'")):
        with pytest.raises(ValueError, match=f"`layouts` must .*{text}"):
            merge_checkpoint(paths[0], tmp_path / "0", tmp_path / "x", layouts=layouts)


def test_a_quantised_base_is_written_as_the_method_gives_it(inputs, tmp_path):
    rule = jlora.Rule("w", 2, init="loftq", layout="oi")
    run_job("init", inputs, tmp_path / "new", rank=2, method="loftq")
    base = open_checkpoint(tmp_path / "new" / "base")
    factors, _ = jlora.load_peft(tmp_path / "new" / "adapter")
    for module in MODULES:
        w = open_checkpoint(inputs[0])[f"{module}.weight"]
        with jax.enable_x64(True):
            params = {"w": w}
            plan = jlora.make_plan(params, rule)
            adapted = jlora.adapt(params, plan, key=KEY)["w"]
        # LoftQ uses no key, so that a plain call gives the same numbers.
        np.testing.assert_allclose(base[f"{module}.weight"], adapted.base, atol=1e-6)
        np.testing.assert_allclose(
            factors[module].u @ factors[module].v,
            np.matmul(*map(np.asarray, adapted.factors)),
            atol=1e-6,
        )


def test_methods_that_no_adapter_can_hold_are_refused(inputs, tmp_path):
    for method in ("lora_xs", "svf", jlora.initializers.pissa(residual=False)):
        with pytest.raises(ValueError, match="`method` must give a base and two"):
            run_job("init", inputs, tmp_path / "new", rank=2, method=method)


def test_the_dtype_of_an_adapter_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    u, v = (rng.standard_normal(s).astype(ml_dtypes.bfloat16) for s in ((5, 3), (3, 6)))
    jlora.save_peft(tmp_path / "a", {"q": jlora.Factors(u, v)})
    resize_adapter(tmp_path / "a", tmp_path / "b", rank=2, progress=False)
    found, _ = jlora.load_peft(tmp_path / "b")
    assert found["q"].u.dtype == ml_dtypes.bfloat16
    # An exact sum of 16 bits needs 32.
    combine_adapters({tmp_path / "a": 0.3}, tmp_path / "c", progress=False)
    exact, _ = jlora.load_peft(tmp_path / "c")
    assert exact["q"].u.dtype == np.float32
    product = np.float64(u) @ np.float64(v)
    np.testing.assert_allclose(exact["q"].u @ exact["q"].v, 0.3 * product, rtol=1e-5)


def test_weights_of_any_kind_of_number(inputs, tmp_path):
    base, _, adapter = inputs
    weights = {"plain": 0.5, "numpy": np.float32(0.5), "jax": jax.numpy.float32(0.5)}
    for name, weight in weights.items():
        combine_adapters({adapter: weight}, tmp_path / name, progress=False)
        merge_checkpoint(
            base, {adapter: weight}, tmp_path / f"m-{name}", progress=False
        )
    for start in ("", "m-"):
        files = [sorted((tmp_path / f"{start}{name}").iterdir()) for name in weights]
        for plain, *others in zip(*files, strict=True):
            assert {each.read_bytes() for each in others} == {plain.read_bytes()}
