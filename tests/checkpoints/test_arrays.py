"""Files of arrays: saved and loaded exactly, or refused whole."""

import os

import ml_dtypes
import numpy as np
import pytest

import jlora

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "file": np.array([1.5, -2.0], ml_dtypes.bfloat16),
    "double": np.array([[1 / 3]]),
    "scalar": np.array(3, np.int32),
    "empty": np.zeros((0, 4), np.float16),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_save_and_load_is_exact(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    jlora.save_arrays(path, ARRAYS)
    loaded = jlora.load_arrays(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["layer.weight", "file", "double"])
def test_npy_has_one_array(tmp_path, name):
    jlora.save_arrays(tmp_path / "w.npy", ARRAYS[name])
    loaded = jlora.load_arrays(tmp_path / "w.npy")
    assert list(loaded) == ["w"]
    assert loaded["w"].dtype == ARRAYS[name].dtype
    assert loaded["w"].tobytes() == ARRAYS[name].tobytes()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "other bytes"])
def test_damaged_file(tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    jlora.save_arrays(path, {"w": np.ones((50, 4))})
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": content[:-100], "other bytes": b"hello" * 9}[damage]
    )
    with pytest.raises(ValueError, match=r"w\..*: must (hold arrays|be a whole)"):
        jlora.load_arrays(path)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "w.npy"
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        jlora.load_arrays(path)
    with pytest.raises(TypeError, match="must hold numbers, got Python objects"):
        jlora.save_arrays(path, {"w": np.array([{}], dtype=object)})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    jlora.save_arrays(path, {"w": np.ones(2)})
    before = path.read_bytes()
    with pytest.raises(
        TypeError, match="dtypes that safetensors knows, got complex128 at w"
    ):
        jlora.save_arrays(path, {"w": np.ones(2, np.complex128)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match=r"must end in .npy, .npz, .safetensors, got '.bin'"
    ):
        jlora.load_arrays(tmp_path / "w.bin")
    with pytest.raises(FileNotFoundError):
        jlora.load_arrays(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="exactly one array, got 2"):
        jlora.save_arrays(tmp_path / "w.npy", {"a": np.ones(1), "b": np.ones(1)})
    with pytest.raises(ValueError, match="at least one array, got none"):
        jlora.save_arrays(tmp_path / "w.npz", {})
    assert os.listdir(tmp_path) == []
