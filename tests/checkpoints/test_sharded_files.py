"""Arrays sharded over devices and processes: saved as on one device, or by none."""

import io
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora.checkpoints.safetensors import _DTYPES, write_safetensors
from tests.helpers.processes import run_processes, run_well
from tests.helpers.sharded_arrays import ARRAYS, LAYOUTS, SHARD, find_expected

SAVE = (
    ARRAYS
    + SHARD
    + """
import os
local = {"local": np.arange(5)}
for suffix in (".safetensors", ".npz"):
    jlora.save_arrays(f"{folder}/all{suffix}", arrays | local)
    results[suffix] = os.path.exists(f"{folder}/all{suffix}")
with jax.set_mesh(mesh):
    jlora.save_arrays(f"{folder}/one.npy", arrays["w.both"])
quantized = jlora.quantization.quantize(jax.numpy.asarray(host["w.both"]), "int8")
codes = shard(np.asarray(quantized.codes), P("x"))
import dataclasses
jlora.save_arrays(
    f"{folder}/quantized.safetensors",
    {"w": dataclasses.replace(quantized, codes=codes)},
)

def make_factors():
    return {
        f"layers.{i}.q_proj": jlora.Factors(
            shard(host["w.rows"] + i, P("x")), shard(host["w.rows"].T - i, P(None, "x"))
        )
        for i in range(3)
    }

jlora.save_peft(f"{folder}/adapter", make_factors(), scale=0.5)
results["adapter"] = sorted(os.listdir(f"{folder}/adapter"))
"""
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return {layout: (folder, results)} of the program that saves."""
    found = {}
    for num_processes, num_devices in LAYOUTS:
        folder = tmp_path_factory.mktemp(f"by_{num_processes}")
        found[num_processes] = (
            folder,
            run_well(SAVE, num_processes, num_devices=num_devices, arguments=[folder]),
        )
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_sharded_arrays_are_saved_as_one_device_does(saved, tmp_path, count, suffix):
    folder, results = saved[count]
    path = tmp_path / f"all{suffix}"
    jlora.save_arrays(path, find_expected() | {"local": np.arange(5)})
    content = (folder / f"all{suffix}").read_bytes()
    if suffix == ".safetensors":  # members of .npz files have the time
        assert content == path.read_bytes()
    loaded = jlora.load_arrays(folder / f"all{suffix}")
    for name, array in find_expected().items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].tobytes() == array.tobytes()
    # Every process found the file when the call returned.
    assert [each[suffix] for each in results] == [True] * count


@pytest.mark.parametrize("count", [1, 2, 4])
def test_other_files_are_saved_as_one_device_does(saved, tmp_path, count):
    folder, _ = saved[count]
    host = find_expected()
    loaded = jlora.load_arrays(folder / "one.npy")["one"]
    assert loaded.tobytes() == host["w.both"].tobytes()

    quantized = jlora.quantization.quantize(jax.numpy.asarray(host["w.both"]), "int8")
    path = tmp_path / "quantized.safetensors"
    jlora.save_arrays(path, {"w": quantized})
    assert (folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(folder)) == [
        "adapter",
        "all.npz",
        "all.safetensors",
        "one.npy",
        "quantized.safetensors",
    ]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sharded_factors_are_saved_as_one_device_does(saved, tmp_path, count):
    folder, results = saved[count]
    w = find_expected()["w.rows"]
    factors = {f"layers.{i}.q_proj": jlora.Factors(w + i, w.T - i) for i in range(3)}
    jlora.save_peft(tmp_path / "adapter", factors, scale=0.5)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        expected = (tmp_path / "adapter" / name).read_bytes()
        assert (folder / "adapter" / name).read_bytes() == expected
        assert all(name in each["adapter"] for each in results)


BAD = (
    ARRAYS
    + SHARD
    + """
import os
from jlora.checkpoints import files
path = f"{folder}/w.safetensors"
jlora.save_arrays(path, arrays)
before = open(path, "rb").read()

note("suffix", lambda: jlora.save_arrays(f"{folder}/w.bin", arrays))
note("folder", lambda: jlora.save_arrays(f"{folder}/no/w.npz", arrays))
note("path", lambda: jlora.save_arrays(f"{folder}/{index}.npz", arrays))
fewer = {name: arrays[name] for name in list(arrays)[index:]}
note("arrays", lambda: jlora.save_arrays(path, fewer))
keys = jax.random.split(jax.random.key(0), 2)
note("keys", lambda: jlora.save_arrays(path, arrays | {"key": keys}))

part = jax.make_mesh((2,), ("x",), devices=jax.devices()[1:3])
rows = N(part, P("x"))
zeros = np.zeros((8, 2), np.float32)
some = jax.make_array_from_callback((8, 2), N(part, P("x")), lambda i: zeros[i])
note("fine on a part", lambda: jlora.save_arrays(f"{folder}/part.npz", {"a": some}))

replace_file = files.replace_file
class Full:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        if self.file.tell() > 400:
            raise OSError(28, "No space left on device", path)
        return self.file.write(data)
    def __getattr__(self, name):
        return getattr(self.file, name)

import contextlib, jlora.checkpoints.arrays as module
@contextlib.contextmanager
def replace_on_full_disk(path):
    with replace_file(path) as file:
        yield Full(file)
module.replace_file = replace_on_full_disk
note("full", lambda: jlora.save_arrays(path, arrays))
module.replace_file = replace_file

spoiled = host["w.rows"].copy()
spoiled[7, 3] = np.nan
factors = {
    f"{name}.q_proj": jlora.Factors(shard(u, P("x")), shard(host["w.rows"].T, P()))
    for name, u in {"a": host["w.rows"], "b": spoiled}.items()
}
note("nan", lambda: jlora.save_peft(f"{folder}/adapter", factors))
_processes.wait_for_all("all refused")
results["unchanged"] = open(path, "rb").read() == before
results["files"] = sorted(os.listdir(folder))
"""
)


def test_a_refusal_of_the_writer_reaches_all_processes(tmp_path):
    first, second = run_well(BAD, 2, arguments=[tmp_path])
    assert first == second
    assert first["unchanged"]
    assert first["files"] == ["part.npz", "w.safetensors"]
    patterns = {
        "suffix": ("ValueError", "must end in .npy, .npz, .safetensors, got '.bin'"),
        "folder": ("ValueError", "must be a file in a folder that can be written to"),
        "path": ("ValueError", "`arrays` must be the same on all processes"),
        "arrays": ("ValueError", "`arrays` must be the same on all processes"),
        "keys": ("TypeError", "got a key at key. Save its numbers"),
        "full": ("OSError", "[Errno 28] No space left on device"),
        "nan": ("ValueError", "must be finite, got NaN or Inf in b.q_proj.u"),
    }
    for name, (kind, text) in patterns.items():
        assert first[name][0] == kind
        assert text in first[name][1]
    assert first["fine on a part"] is None


def test_an_array_on_some_processes_only_is_refused():
    program = (
        ARRAYS
        + SHARD
        + """
mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
zeros = np.zeros((8, 2), np.float32)
part = jax.make_array_from_callback(
    (8, 2), N(mesh, P("x")), lambda i: zeros[i], dtype=np.float32
)
note("part", lambda: jlora.save_arrays(f"{folder}/a.npz", arrays | {"part": part}))
"""
    )
    for each in run_well(program, 4, num_devices=1, arguments=["/missing"]):
        kind, text = each["part"]
        assert kind == "ValueError"
        assert "part must lie on devices of all 4 processes, got 2 of them" in text


def test_the_others_end_when_the_writer_dies(tmp_path):
    program = (
        ARRAYS
        + SHARD
        + """
import os, signal
from jlora.checkpoints import host_arrays
if index == 0:
    share, calls = host_arrays.share_error, []
    def die(error):
        calls.append(1)
        if len(calls) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        share(error)
    host_arrays.share_error = die
jlora.save_arrays(f"{folder}/w.safetensors", arrays)
"""
    )
    dead, other = run_processes(program, 2, timeout=40, arguments=[tmp_path])
    assert dead.code == -9
    assert other.code in (1, -6)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]


def test_the_host_holds_one_array_at_a_time(tmp_path):
    program = """
import tracemalloc
from jlora.checkpoints.host_arrays import to_host
mesh = jax.make_mesh((4,), ("x",))
rows = jax.NamedSharding(mesh, jax.P("x"))
one = np.ones((2048, 128), np.float32)
arrays = {f"w{i}": jax.device_put(one, rows) for i in range(10)}
factors = {
    f"l{i}.q_proj": jlora.Factors(w, jax.device_put(one.T, rows))
    for i, w in enumerate(arrays.values())
}
jlora.save_arrays(sys.argv[4] + "/warm.safetensors", {"a": arrays["w0"]})
jlora.save_peft(sys.argv[4] + "/warm", {"q_proj": factors["l0.q_proj"]})
for name, save in {
    "arrays": lambda: jlora.save_arrays(sys.argv[4] + "/w.safetensors", arrays),
    "factors": lambda: jlora.save_peft(sys.argv[4] + "/adapter", factors),
    "numpy": lambda: [np.asarray(array) for array in arrays.values()],
}.items():
    tracemalloc.start()
    save()
    now, peak = tracemalloc.get_traced_memory()
    results[name] = [now / one.nbytes, peak / one.nbytes]
    tracemalloc.stop()
"""
    (found,) = run_well(program, 1, num_devices=4, arguments=[tmp_path])
    assert found["arrays"][0] < 0.2  # nothing is kept
    assert found["arrays"][1] < 1.2
    assert found["factors"][0] < 0.2
    assert found["factors"][1] < 6  # u and v, each as read and as transposed
    assert found["numpy"][1] > 9  # the measure sees the copies that JAX keeps


def test_the_writer_gives_the_bytes_of_the_library():
    rng = np.random.default_rng(0)
    arrays = {
        f"{(7 * i + 5 * j) % 31}é{i}": rng.integers(0, 2, (3, 1 + j)).astype(dtype)
        for i, dtype in enumerate(_DTYPES.values())
        for j in range(2)
    }
    arrays |= {"scalar": np.asarray(3), "empty": np.zeros((0, 4), np.float16)}
    file = io.BytesIO()
    write_safetensors(file, arrays)
    expected = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert file.getvalue() == expected
