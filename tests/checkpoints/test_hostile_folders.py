"""Damaged adapters and model folders, and outputs that cannot become folders.

Readers give arrays, or a ValueError or OSError that names the file.
"""

import json
import os
import socket
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import jlora
from jlora.checkpoints import (
    combine_adapters,
    extract_checkpoint,
    initialize_checkpoint,
    merge_checkpoint,
    open_checkpoint,
    read_peft,
    resize_adapter,
)
from tests.helpers.model_folders import MODULES, write_adapter, write_model

KEY = jax.random.key(0)
NUM_MUTANTS = 500  # of each kind of folder


def read_all(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


KINDS = {"model": (write_model, read_all), "adapter": (write_adapter, read_peft)}


def mutate(rng, content):
    """Return the bytes with some changed, dropped, doubled or added."""
    mutant = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(max(len(mutant), 1))
        kind = rng.integers(5)
        if kind == 0 and mutant:
            mutant[place] = rng.integers(256)
        elif kind == 1:
            del mutant[place : place + rng.integers(1, 8)]
        elif kind == 2:
            mutant[place:place] = mutant[place : place + rng.integers(1, 30)]
        elif kind == 3:
            words = [b"null", b"-1", b"{}", b"[]", b'"x"', b"1e999", b"../", b"9" * 30]
            mutant[place:place] = words[rng.integers(len(words))]
        else:
            del mutant[place:]
    return bytes(mutant)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_read_or_refused_by_name(tmp_path, kind):
    write, read = KINDS[kind]
    folder = write(tmp_path / "folder")
    files = sorted(path for path in folder.iterdir())
    rng = np.random.default_rng(0)
    num_refused = 0
    for number in range(NUM_MUTANTS):
        path = files[number % len(files)]
        content = path.read_bytes()
        path.write_bytes(mutate(rng, content))
        try:
            read(folder)
        except (ValueError, OSError) as error:
            num_refused += 1
            text = str(error)
            assert str(folder) in text or "must hold" in text, text
            assert "\n" not in text
        path.write_bytes(content)
    assert num_refused > NUM_MUTANTS / 4  # the rest changes numbers or unread names
    read(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=6,
)
ENTRIES = [
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_parameters",
    "init_lora_weights",
    "target_modules",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "peft_version",
]
SIDES = {
    "model.safetensors.index.json": ("metadata", "weight_map"),
    "config.json": ("architectures", "model_type", "quantization_config"),
}


def find_error(run):
    """Return the text of a ValueError, or None."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


@hypothesis.given(entry=st.sampled_from(ENTRIES), value=JSON)
def test_any_entry_of_a_configuration(entry, value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    path = write_adapter(folder) / "adapter_config.json"
    config = json.loads(path.read_text()) | {entry: value}
    path.write_text(json.dumps(config))
    error = find_error(lambda: read_peft(folder))
    if error is not None:
        assert str(folder) in error
        return
    adapter = read_peft(folder)
    assert set(adapter.factors) == set(MODULES)
    assert all(np.isfinite(pair.v).all() for pair in adapter.factors.values())


@pytest.mark.parametrize("alpha", [5.2e38, 3.3e38, 1e300])
def test_a_scale_that_overflows_is_refused(tmp_path, alpha):
    ones = np.ones((4, 1), np.float32)
    jlora.save_peft(tmp_path / "a", {"q_proj": jlora.Factors(ones, 2 * ones.T)})
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
    with pytest.raises(ValueError, match=r"a: must have a scale that keeps .* q_proj"):
        read_peft(tmp_path / "a")


@hypothesis.given(data=st.data(), file=st.sampled_from(sorted(SIDES)))
def test_any_json_beside_the_weights(data, file, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "m")
    adapter = write_adapter(folder.parent / "a")
    path = folder / file
    content = json.loads(path.read_text())
    content |= data.draw(st.dictionaries(st.sampled_from(SIDES[file]), JSON))
    path.write_text(json.dumps(data.draw(st.just(content) | JSON)))

    def run():
        merge_checkpoint(folder, adapter, folder.parent / "new", dry_run=True)

    error = find_error(run)
    assert error is None or str(path) in error or "model_type" in error


def list_jobs(base, tuned, adapter):
    """Return {name: function of an output folder} of all jobs."""
    quiet = {"progress": False}
    return {
        "merge": lambda out: merge_checkpoint(base, adapter, out, **quiet),
        "extract": lambda out: extract_checkpoint(
            base, tuned, out, rank=2, key=KEY, **quiet
        ),
        "init": lambda out: initialize_checkpoint(base, out, rank=2, key=KEY, **quiet),
        "resize": lambda out: resize_adapter(adapter, out, rank=1, **quiet),
        "combine": lambda out: combine_adapters({adapter: 0.5}, out, **quiet),
    }


JOBS = ("merge", "extract", "init", "resize", "combine")


@pytest.fixture
def inputs(tmp_path):
    return (
        write_model(tmp_path / "base"),
        write_model(tmp_path / "tuned", seed=1),
        write_adapter(tmp_path / "adapter"),
    )


@pytest.mark.parametrize("job", JOBS)
def test_outputs_that_cannot_become_folders(inputs, tmp_path, job):
    run = list_jobs(*inputs)[job]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    kinds = {
        "/dev/null": "a device",
        tmp_path / "pipe": "a pipe",
        tmp_path / "s": "a socket",
        tmp_path / "file": "a file",
        tmp_path / "dangling": "a link to nothing",
        inputs[0]: "a folder",
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for path, kind in kinds.items():
        with pytest.raises(ValueError, match=f"does not exist yet, got {kind}"):
            run(path)
    for path in inputs[0] / "new", inputs[2] / "new":
        if job in ("merge", "combine", "resize") or path.parent == inputs[0]:
            is_input = path.parent == inputs[2] or job in ("merge", "extract", "init")
            if is_input:
                with pytest.raises(ValueError, match="outside of the inputs"):
                    run(path)
    with pytest.raises(ValueError, match="in a folder that can be written to"):
        run(tmp_path / "no" / "folder")
    listener.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "kept"


FULL = """
import resource, sys, jax, jlora
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
from tests.checkpoints.test_hostile_folders import list_jobs
list_jobs(*sys.argv[2:5])[sys.argv[1]](sys.argv[5])
"""


@pytest.mark.parametrize("job", JOBS)
def test_a_disk_that_fills_leaves_no_result(inputs, tmp_path, job):
    arguments = [str(path) for path in (*inputs, tmp_path / "out")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, job, *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    list_jobs(*inputs)[job](tmp_path / "out")  # goes on with the same folder
    assert (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("job", JOBS)
def test_no_room_on_the_disk_is_found_first(inputs, tmp_path, job, monkeypatch):
    full = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(ValueError, match=r"must have room for \d+ bytes, got 0 free"):
        list_jobs(*inputs)[job](tmp_path / "out")
    assert not (tmp_path / "out").exists()
