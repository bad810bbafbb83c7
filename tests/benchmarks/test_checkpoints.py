import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import jlora
from benchmarks.report.targets import checkpoints as targets
from benchmarks.run import process_memory
from benchmarks.run.contenders import Level
from benchmarks.run.environment import ROOT
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import check_record
from benchmarks.suites import checkpoints
from benchmarks.suites.checkpoints import (
    checkpoint_pairs,
    extraction,
    memory,
    merges,
    opening,
    resizing,
    synthetic,
    written_files,
)
from jlora.checkpoints import open_checkpoint

# One run of each: the tests check that it runs and how exact it is, not how fast.
ONCE = Level("quick", 1, 0.1)
LIMITS = Limits({("float32", "highest"): 1e11, ("bfloat16", "default"): 1e11}, 1e10)
needs_samples = pytest.mark.skipif(
    process_memory.why_no_samples() is not None,
    reason="the memory of a process is sampled on Linux only",
)


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    """Temporary folders lie in the one of the test, where a test can count them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def measure(group):
    """Return {contender: errors} of those that were measured, every record checked."""
    records = measure_group(group, ONCE, LIMITS)
    for record in records:
        check_record(json.loads(json.dumps(record)))
        # A peer may be missing here; it may not fail where it is installed.
        missing = record["role"] != "jlora" and "is not installed" in (
            record["reason"] or ""
        )
        assert missing or record["status"] == "measured", record["reason"]

    return {
        record["implementation"]: record["errors"]
        for record in records
        if record["status"] == "measured"
    }


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_each_contender_has_a_record_of_its_own(level, platform):
    groups = checkpoints.list_groups(level, platform)
    keys = [
        (group.operation, group.case.name, contender.name)
        for group in groups
        for contender in group.contenders
    ]
    assert len(set(keys)) == len(keys)
    for group in groups:
        assert group.contenders[0].role == "jlora"
        assert all(contender.setting for contender in group.contenders)
        assert group.case.describe()["name"] == group.case.name


def test_lists_import_no_peer():
    code = (
        "import sys; from benchmarks.suites import list_suite\n"
        "for level in ('quick', 'full'): list_suite('checkpoints', level, 'cpu')\n"
        "print({'torch', 'peft', 'threadpoolctl'} & set(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "set()"


def test_workspaces_are_removed_with_their_last_reference(temporary_folder):
    workspace = synthetic.Workspace()
    (workspace.clear("output")).mkdir()
    (workspace.path / "output" / "file").write_text("content")
    assert list(workspace.clear("output").parent.iterdir()) == []
    del workspace
    assert list(temporary_folder.iterdir()) == []


def test_checkpoints_are_sharded_as_their_index_says(temporary_folder):
    shapes = synthetic.list_tensors(16, 2, vocabulary=40)
    block = synthetic.RandomBlock()
    folder = temporary_folder / "base"
    written_files.write_checkpoint(folder, shapes, block.make_weight)

    checkpoint = open_checkpoint(folder)
    assert {name: checkpoint.info(name).shape for name in checkpoint} == shapes
    assert len({checkpoint.info(name).file for name in checkpoint}) == 4
    assert checkpoint.num_bytes == synthetic.count_bytes(shapes)
    for name, shape in shapes.items():
        np.testing.assert_array_equal(checkpoint[name], block.make_weight(name, shape))


def test_layers_fill_the_bytes_asked_for():
    layers = synthetic.count_layers(2**32, 2048, 32000)
    total = synthetic.count_bytes(synthetic.list_tensors(2048, layers, 32000))
    assert 2**32 <= total < 1.05 * 2**32


def test_opening_finds_every_name(temporary_folder):
    for errors in measure(opening.make_open_group(20)).values():
        assert errors == {"wrong or missing names": 0, "names found": 20}
    assert list(temporary_folder.iterdir()) == []


def test_extraction_captures_most_of_the_best_energy(temporary_folder):
    found = measure(extraction.make_extract_group(64, 2, 32, with_full_svd=True))
    for name, errors in found.items():
        assert errors["modules"] == 14
        # Errors of float32 factors count squared. The flat noise behind the twelve
        # directions is hard for a random sketch.
        bound = 1e-6 if name == "torch.linalg.svd" else 0.05
        assert -1e-6 < errors["energy shortfall"] < bound
    assert "jlora extract_checkpoint" in found
    assert list(temporary_folder.iterdir()) == []


def test_shortfall_is_the_missing_part_of_the_best_energy(temporary_folder):
    pair = checkpoint_pairs.make_pair(64, 1)
    factors = {}
    for path in pair.list_checked():
        u, s, vt = np.linalg.svd(pair.read_difference(path), full_matrices=False)
        # In one module the third direction takes the place of the second.
        is_worst = path.endswith("q_proj")
        chosen = [0, 2] if is_worst else [0, 1]
        v = (u * s)[:, chosen].T
        factors[path] = jlora.Factors(vt[chosen].T.copy(), v.copy())
        if is_worst:
            expected = 1 - (s[0] ** 2 + s[2] ** 2) / (s[0] ** 2 + s[1] ** 2)
    jlora.save_peft(temporary_folder / "adapter", factors)

    errors = checkpoint_pairs.measure_shortfall(
        2, (pair,), temporary_folder / "adapter"
    )
    np.testing.assert_allclose(errors["energy shortfall"], expected, rtol=1e-4)


def test_best_energies_of_two_modules_are_not_mixed_up():
    pair = checkpoint_pairs.make_pair(64, 1)
    for path in pair.list_checked():
        difference = pair.read_difference(path).astype(np.float64)
        energy = np.sum(np.linalg.svd(difference, compute_uv=False)[:8] ** 2)
        np.testing.assert_allclose(pair.find_best_energy(path, 8), energy, rtol=1e-9)


def test_changes_are_one_percent_of_their_weights():
    pair = checkpoint_pairs.make_pair(64, 1)
    base = open_checkpoint(pair.base)
    for path in pair.list_checked():
        weight = np.linalg.norm(base[f"{path}.weight"].astype(np.float32))
        change = np.linalg.norm(pair.read_difference(path))
        # The rounding of both to bfloat16 adds up to a fifth, squared.
        assert 0.0095 < change / weight < 0.0105


def test_first_extraction_compiles_and_finds_the_same(monkeypatch):
    cleared = []
    # Emptying the real caches would make every later test compile again.
    monkeypatch.setattr(extraction.jax, "clear_caches", lambda: cleared.append(True))
    (errors,) = measure(extraction.make_cold_extract_group(64, 1, 32)).values()
    assert cleared
    assert errors["energy shortfall"] < 0.05


def test_merges_have_no_wrong_element(temporary_folder):
    found = measure(merges.make_merge_group(2**19, 64, 100, 4))
    assert found["jlora merge_checkpoint"]["wrong elements"] == 0
    assert found["copy of the files"] == {}
    assert list(temporary_folder.iterdir()) == []


def test_wrong_elements_and_ties_are_told_apart():
    u, v = np.zeros((3, 1)), np.zeros((1, 2))
    u[0], v[0, 0] = 1.0, 2.0**-9  # half of the spacing behind 1
    weight = np.ones((2, 3), synthetic.BFLOAT16)
    merged = weight.copy()
    assert merges._count_wrong(weight, (u, v), merged) == (0, 0)
    merged[0, 0] = 1 + 2.0**-7
    assert merges._count_wrong(weight, (u, v), merged) == (1, 0)
    v[0, 0] = 2.0**-8
    assert merges._count_wrong(weight, (u, v), merged) == (0, 1)


def test_copies_have_the_same_bytes(temporary_folder):
    source, target = temporary_folder / "one", temporary_folder / "other"
    source.mkdir()
    for name, content in (("a", b""), ("b", b"content" * 1000)):
        (source / name).write_bytes(content)
    merges._copy_folder(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }


def test_resized_adapters_are_optimal(temporary_folder):
    found = measure(resizing.make_resize_group(48, 2, 16, 4, with_dense=True))
    assert "jlora resize_adapter" in found
    for errors in found.values():
        # Rounding moves the result by 1e-6 of its norm, but hardly along the residual:
        # it counts squared.
        assert abs(errors["excess error"]) < 1e-8
        assert errors["modules"] == 14
    assert list(temporary_folder.iterdir()) == []


def run_python(code):
    return process_memory.measure_process([sys.executable, "-c", code])


@needs_samples
def test_memory_counts_what_a_process_cannot_give_back(temporary_folder):
    path = temporary_folder / "file"
    path.write_bytes(bytes(2**26))
    prepare = "import mmap, time; n = 2**26\n"
    wait = "time.sleep(0.1)"
    nothing = run_python(f"{prepare}{wait}")
    touched = run_python(f"{prepare}a = b'x' * n; {wait}")
    mapped = run_python(
        f"{prepare}f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), n, "
        f"access=mmap.ACCESS_READ); sum(m[::4096]); {wait}"
    )
    shared = run_python(
        f"{prepare}m = mmap.mmap(-1, n); m[::4096] = b'x' * (n // 4096); {wait}"
    )

    for peak in (touched, shared):
        assert 0.9 * 2**26 < peak - nothing < 1.2 * 2**26
    assert mapped - nothing < 0.1 * 2**26


@needs_samples
def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"got 3:\n.*reason"):
        run_python("import sys; print('the reason'); sys.exit(3)")


@needs_samples
def test_jobs_run_in_processes_of_their_own(temporary_folder, monkeypatch):
    group = memory.make_memory_group(2**19, 64, 100)
    assert len(group.contenders) == 5
    (merge,) = [each for each in group.contenders if "merge" in each.name]
    found = measure(group._replace(contenders=(merge,)))
    # More than the interpreter takes, and less than the job may take.
    assert 0.02 < found[merge.name]["peak anonymous GiB"] < 1
    assert list(temporary_folder.iterdir()) == []


def test_every_job_accepts_its_arguments():
    group = memory.make_memory_group(2**19, 64, 100)
    (workspace,) = group.make_inputs()
    names = ("base", "tuned", *memory._ADAPTERS)
    paths = dict(zip(("base", "tuned", "thin", "other", "thick"), names, strict=True))
    for name, (_, call) in memory._JOBS.items():
        scope = {
            "checkpoints": jlora.checkpoints,
            "key": jax.random.key(0),
            "options": {"max_memory": 2**30, "progress": False, "dry_run": True},
            "output": workspace.clear("output"),
            **{key: workspace.path / folder for key, folder in paths.items()},
        }
        assert eval(f"checkpoints.{call}", scope) is not None, name


def test_targets_name_records_of_the_full_level():
    full = checkpoints.list_groups("full", "cpu")
    found = {}
    for group in full:
        for contender in group.contenders:
            key = (group.suite, group.operation, group.case.name, contender.name)
            found[key] = {
                "suite": group.suite,
                "operation": group.operation,
                "case": {"name": group.case.name},
                "time": "2026-01-02T03:04:05+00:00",
                "times_ms": [64.0 if "torch" in contender.name else 32.0] * 3,
                "rounds": [0, 1, 2],
                "errors": {"error": 0.5, "peak anonymous GiB": 0.5},
            }

    values = {target.name: target.measure(found) for target in targets.TARGETS}
    assert None not in values.values()
    assert values["open 10,000 tensors, seconds"] == pytest.approx(0.032)
    assert values["extract, time over svd_lowrank niter 4"] == pytest.approx(0.5)
    ratio = values["resize 224 modules, time over the dense road"]
    assert ratio == pytest.approx(32 / (32 * 64))
