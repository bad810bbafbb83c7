"""`open_checkpoint`: arrays of files and folders, read when they are used."""

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import open_checkpoint


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_folder(folder, shards):
    """Write {file: {name: array}} and an index beside them."""
    places = {}
    for file, arrays in shards.items():
        jlora.save_arrays(folder / file, arrays)
        places |= dict.fromkeys(arrays, file)
    write_index(folder, places)


def write_index(folder, places):
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


def make_arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((6, 4)).astype(np.float32),
        "half": rng.standard_normal((3, 2)).astype(ml_dtypes.bfloat16),
        "scalar": np.float64(3.5).reshape(()),
        "empty": np.zeros((0, 4), np.float16),
        "ids": np.arange(5),
        "eight": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    }


def assert_holds(checkpoint, arrays):
    assert set(checkpoint) == set(arrays)
    for name, array in arrays.items():
        found, info = checkpoint[name], checkpoint.info(name)
        assert (info.shape, info.dtype) == (array.shape, array.dtype.name)
        assert info.num_bytes == array.nbytes
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
        assert found.tobytes() == array.tobytes()
        assert found.flags.writeable


def test_files_and_folders_give_the_arrays_bit_by_bit(tmp_path):
    arrays = make_arrays()
    jlora.save_arrays(tmp_path / "model.safetensors", arrays)
    assert_holds(open_checkpoint(tmp_path / "model.safetensors"), arrays)
    assert_holds(open_checkpoint(tmp_path), arrays)
    assert "6 arrays" in repr(open_checkpoint(tmp_path))

    names = list(arrays)
    folder = tmp_path / "shards"
    folder.mkdir()
    parts = {
        f"model-0000{i + 1}-of-00002.safetensors": {
            name: arrays[name] for name in names[3 * i : 3 * i + 3]
        }
        for i in range(2)
    }
    write_folder(folder, parts)
    checkpoint = open_checkpoint(folder)
    assert_holds(checkpoint, arrays)
    assert len(checkpoint.files) == 2

    # Shards of an earlier save lie beside it, and are not in the index.
    jlora.save_arrays(folder / "model-00001-of-00009.safetensors", {"old": np.ones(2)})
    assert_holds(open_checkpoint(folder), arrays)


def test_rows_are_read_alone(tmp_path):
    big = np.arange(4_000_000, dtype=np.float32).reshape(4000, 1000)
    jlora.save_arrays(tmp_path / "w.safetensors", {"a": big[:2], "w": big})
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    tracemalloc.start()
    rows = checkpoint.read_rows("w", 10, 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(rows, big[10:20])
    assert peak < 2 * rows.nbytes + 20_000
    assert checkpoint.read_rows("w", 3990, None).shape == (10, 1000)
    assert checkpoint.read_rows("w", 5, 3).shape == (0, 1000)


def test_ten_thousand_arrays_open_without_reading(tmp_path):
    path = tmp_path / "w.safetensors"
    entries = {
        f"layers.{i}.w": {
            "dtype": "F32",
            "shape": [100, 100],
            "data_offsets": [40_000 * i, 40_000 * (i + 1)],
        }
        for i in range(10_000)
    }
    write_raw(path, entries)
    with open(path, "r+b") as file:  # 400 MB of which the disk holds none
        file.truncate(path.stat().st_size + 400_000_000)
    tracemalloc.start()
    checkpoint = open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(checkpoint) == 10_000
    assert peak < 40_000_000
    assert not checkpoint["layers.77.w"].any()


def test_the_cache_of_hugging_face_may_link_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    jlora.save_arrays(blobs / "w.safetensors", {"w": np.ones(2)})
    os.symlink("../../blobs/w.safetensors", snapshot / "model.safetensors")
    assert list(open_checkpoint(snapshot)) == ["w"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "short": (b"abc", "got 3 bytes"),
    "long header": (struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000 bytes"),
    "no header": (struct.pack("<Q", 50) + b"{}", "48 bytes are missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    content, text = DAMAGED[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{text}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"w": ENTRY}, bytes(5), "3 bytes are missing"),
        ({"w": ENTRY}, bytes(12), "4 extra bytes"),
        (
            b'{"w": %b, "w": %b}' % ((json.dumps(ENTRY).encode(),) * 2),
            bytes(8),
            "twice",
        ),
        ({"w": ENTRY | {"shape": [1000, 1000]}}, bytes(8), "cannot be read"),
        ({"w": ENTRY | {"dtype": "F99"}}, bytes(8), "cannot be read"),
        ([1], b"", "cannot be read"),
    ],
)
def test_damaged_headers(tmp_path, header, data, text):
    path = tmp_path / "w.safetensors"
    write_raw(path, header, data)
    with pytest.raises(ValueError, match=rf"w\.safetensors: .*{text}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({"w": "../w.safetensors"}, "beside it, got '../w.safetensors' for w"),
        ({"w": "/w.safetensors"}, "beside it"),
        ({"w": "C:\\w.safetensors"}, "beside it"),
        ({"w": "w.bin"}, "beside it"),
        ({"w": 3}, "beside it"),
        ({"w": "gone.safetensors"}, "1 that do not: gone.safetensors"),
        ({"v": "w.safetensors"}, "got none called 'v'"),
        ([], "weight_map"),
        ({}, "weight_map"),
    ],
)
def test_hostile_indices(tmp_path, places, text):
    jlora.save_arrays(tmp_path / "w.safetensors", {"w": np.ones(2)})
    jlora.save_arrays(tmp_path / "other.safetensors", {"w": np.ones(2)})
    write_index(tmp_path, places)
    with pytest.raises(ValueError, match=text):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000, b" " * (11 * 2**20)],
)
def test_hostile_json(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json: must"):
        open_checkpoint(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(ValueError, match="one index or one"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="pickled weights, which can run any code"):
            open_checkpoint(path)
    (tmp_path / "w.txt").write_text("1 2")
    with pytest.raises(ValueError, match=r"safetensors file, an \.npy or \.npz"):
        open_checkpoint(tmp_path / "w.txt")

    outside = tmp_path / "folder"
    outside.mkdir()
    jlora.save_arrays(tmp_path / "w.safetensors", {"w": np.ones(2)})
    os.symlink("../w.safetensors", outside / "model.safetensors")
    with pytest.raises(ValueError, match="got a link to"):
        open_checkpoint(outside)


def test_a_file_that_changes_is_noticed(tmp_path):
    path = tmp_path / "w.safetensors"
    jlora.save_arrays(path, {"w": np.ones(2)})
    checkpoint = open_checkpoint(path)
    with pytest.raises(KeyError, match="has no array 'v'"):
        checkpoint["v"]
    jlora.save_arrays(path, {"w": np.ones(3)})
    with pytest.raises(ValueError, match="must not change while it is open"):
        checkpoint["w"]


def test_whether_a_name_is_there_reads_no_data(tmp_path, monkeypatch):
    jlora.save_arrays(tmp_path / "w.safetensors", {"w": np.ones(3)})
    checkpoint = open_checkpoint(tmp_path)

    def refuse(*arguments):
        raise AssertionError("the data was read")

    monkeypatch.setattr(type(checkpoint), "read_rows", refuse)
    assert "w" in checkpoint
    assert "v" not in checkpoint


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_rows_of_one_matrix_of_a_stack(tmp_path, suffix):
    stack = np.arange(60, dtype=np.float32).reshape(3, 5, 4)
    jlora.save_arrays(tmp_path / f"w{suffix}", {"w": stack})
    checkpoint = open_checkpoint(tmp_path / f"w{suffix}")
    for index, start, stop in ((0, 0, 2), (1, 3, 5), (2, 4, None), (1, 2, 2)):
        found = checkpoint.read_rows("w", start, stop, index=index)
        np.testing.assert_array_equal(found, stack[index, start:stop])
