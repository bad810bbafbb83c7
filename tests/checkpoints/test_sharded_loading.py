"""Checkpoints that are loaded onto devices: each process reads its own slices."""

import jax
import numpy as np
import pytest

import jlora
from jlora.checkpoints import load_sharded, open_checkpoint, slices
from tests.helpers.processes import run_well
from tests.helpers.sharded_arrays import ARRAYS, LAYOUTS, SHARD, find_expected

LOAD = (
    ARRAYS
    + SHARD
    + """
C = jlora.checkpoints

def is_right(array, name):
    shards = array.addressable_shards
    values = all(
        np.asarray(s.data).tobytes() == host[name][s.index].tobytes() for s in shards
    )
    return values and array.dtype == host[name].dtype

for suffix in (".safetensors", ".npz"):
    checkpoint = C.open_checkpoint(f"{folder}/all{suffix}")
    loaded = C.load_sharded(checkpoint, {n: N(mesh, specs[n]) for n in host})
    results[suffix] = [
        n for n, array in loaded.items()
        if not is_right(array, n) or array.sharding.spec != specs[n]
    ]
    by_rule = C.load_sharded(
        checkpoint, lambda name, shape: N(mesh, P("x") if len(shape) == 2 else P())
    )
    results[f"{suffix} rule"] = {n: str(a.sharding.spec) for n, a in by_rule.items()}
    one = C.load_sharded(checkpoint, N(mesh, P()))
    results[f"{suffix} one"] = [n for n in host if not is_right(one[n], n)]

def load(**shardings):
    return list(C.load_sharded(checkpoint, shardings))

checkpoint = C.open_checkpoint(f"{folder}/all.safetensors")
three = jax.make_mesh((3,), ("z",), devices=jax.devices()[:3])
note("size", lambda: load(bias=N(three, P("z"))))
note("axes", lambda: load(bias=N(mesh, P("x", "y"))))
note("name", lambda: load(nothing=N(mesh, P())))
note("kind", lambda: load(bias=P("x")))
note("axis", lambda: C.load_sharded(checkpoint, lambda name, shape: N(mesh, P("z"))))
if index == count - 1:
    checkpoint._arrays["bias"] = checkpoint._arrays["bias"]._replace(
        state=checkpoint._arrays["bias"].state._replace(num_bytes=1)
    )
note("changed", lambda: load(bias=N(mesh, P("x"))))
"""
)


@pytest.fixture(scope="module", params=LAYOUTS, ids=["1", "2", "4"])
def loaded(request, tmp_path_factory):
    num_processes, num_devices = request.param
    folder = tmp_path_factory.mktemp("load")
    for suffix in (".safetensors", ".npz"):
        jlora.save_arrays(folder / f"all{suffix}", find_expected())
    return run_well(LOAD, num_processes, num_devices=num_devices, arguments=[folder])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_each_device_gets_its_part_of_a_file(loaded, suffix):
    for each in loaded:
        assert each[suffix] == []
        assert each[f"{suffix} one"] == []
        specs = each[f"{suffix} rule"]
        assert specs.keys() == find_expected().keys()
        for name, array in find_expected().items():
            assert specs[name] == ("P('x',)" if array.ndim == 2 else "P()")


def test_shardings_that_do_not_fit_are_refused_by_name(loaded):
    patterns = {
        "size": ("ValueError", "must divide bias of shape (8,) into equal parts, got"),
        "axes": ("ValueError", "must divide bias of shape (8,) into equal parts, got"),
        "name": ("KeyError", "has no array 'nothing'"),
        "kind": ("TypeError", "bias: `shardings` must give a jax.sharding.Sharding"),
        "axis": ("ValueError", "`shardings` must give a sharding for shape"),
        "changed": ("ValueError", "must not change while it is open"),
    }
    for each in loaded:
        for name, (kind, text) in patterns.items():
            assert each[name][0] == kind
            assert text in each[name][1], name
        assert "got P('z',) on a mesh of {'z': 3}" in each["size"][1]


def test_a_dtype_that_jax_would_round_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    jlora.save_arrays(path, {"w": np.ones((2, 2))})
    rows = jax.NamedSharding(jax.make_mesh((1,), ("x",)), jax.P("x"))
    with pytest.raises(ValueError, match=r"w must have a dtype .* got float64\. Set"):
        load_sharded(open_checkpoint(path), rows)
    with jax.enable_x64(True):
        assert load_sharded(open_checkpoint(path), rows)["w"].dtype == np.float64


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("min_run", "most"), [(0, 1), (2**40, 1), (2**40, 99), (20, 500)]
)
def test_slices_are_those_of_numpy(tmp_path, monkeypatch, suffix, min_run, most):
    monkeypatch.setattr(slices, "_MIN_RUN_BYTES", min_run)
    monkeypatch.setattr(slices, "_MAX_READ_BYTES", most)
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((6, 5, 4, 3)),
        "b": rng.standard_normal((7, 9)).astype(np.float16),
        "c": np.arange(5),
        "scalar": np.asarray(3.0),
        "empty": np.zeros((0, 3)),
    }
    jlora.save_arrays(tmp_path / f"w{suffix}", arrays)
    checkpoint = open_checkpoint(tmp_path / f"w{suffix}")
    for name, array in arrays.items():
        for _ in range(50):
            ranges = [sorted(rng.integers(0, size + 1, 2)) for size in array.shape]
            index = tuple(
                slice(*map(int, each)) if rng.random() < 0.6 else slice(None)
                for each in ranges
            )
            found = checkpoint.read_slice(name, index)
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array[index])


def test_only_the_bytes_of_a_slice_are_read(tmp_path, monkeypatch):
    w = np.arange(2**20, dtype=np.float32).reshape(512, 2048)
    jlora.save_arrays(tmp_path / "w.safetensors", {"w": w})
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    num_bytes, fill = [], slices.fill

    def count(array, stream):
        num_bytes.append(array.nbytes)
        return fill(array, stream)

    monkeypatch.setattr(slices, "fill", count)
    # Of a few columns the whole row is read, which is not much more than a page.
    for index, expected in (
        (np.s_[:128,], 128 * 8192),
        (np.s_[:, 1024:], 512 * 4096),
        (np.s_[64:65, 1:5], 8192),
    ):
        num_bytes.clear()
        found = checkpoint.read_slice("w", index)
        np.testing.assert_array_equal(found, w[index])
        assert sum(num_bytes) == expected
    for index in ((slice(0, 4, 2),), (0,), (slice(None),) * 3):
        with pytest.raises(ValueError, match="`index` must have"):
            checkpoint.read_slice("w", index)
