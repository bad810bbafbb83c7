"""`open_checkpoint` of .npy and .npz files: headers first, data when it is used."""

import io
import os
import struct
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.checkpoints import (
    extract_checkpoint,
    initialize_checkpoint,
    merge_checkpoint,
    open_checkpoint,
)

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((7, 5)).astype(np.float32)
ARRAYS = {
    "c": MATRIX,
    "fortran": np.asfortranarray(MATRIX),
    "deep": np.asfortranarray(RNG.standard_normal((4, 3, 2))),
    "foreign": MATRIX.astype(">f8"),
    "foreign fortran": np.asfortranarray(MATRIX.astype(">f4")),
    "half": MATRIX.astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.5),
    "empty": np.zeros((0, 4), np.float16),
    "ids": np.arange(6),
    "fields": np.array([(1, 2.0), (3, 4.0)], [("a", ">i4"), ("b", "<f8")]),
}


def find_native(dtype):
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def assert_same(found, array):
    array = array.astype(find_native(array.dtype))
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable


def assert_holds(checkpoint, arrays):
    assert list(checkpoint) == list(arrays)
    for name, array in arrays.items():
        info = checkpoint.info(name)
        assert (info.shape, info.num_bytes) == (array.shape, array.nbytes)
        assert info.dtype == find_native(array.dtype).name
        assert info.file == checkpoint.path
        assert_same(checkpoint[name], array)
        if not array.shape:
            assert_same(checkpoint.read_rows(name, 1, None), array)
            continue
        for rows in (slice(0, 1), slice(2, 4), slice(3, None), slice(4, 2)):
            found = checkpoint.read_rows(name, rows.start, rows.stop)
            assert_same(found, array[rows])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_of_numpy_give_the_arrays_bit_by_bit(tmp_path, save):
    path = tmp_path / "w.npz"
    save(path, **ARRAYS)
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, ARRAYS)
    assert checkpoint.files == (path,)
    for name, array in jlora.load_arrays(path).items():
        assert_same(array, ARRAYS[name])


@pytest.mark.parametrize("name", ARRAYS)
def test_files_of_one_array(tmp_path, name):
    np.save(tmp_path / "w.npy", ARRAYS[name])
    assert_holds(open_checkpoint(tmp_path / "w.npy"), {"w": ARRAYS[name]})


def test_archives_of_jlora_and_odd_names(tmp_path):
    arrays = {"a": MATRIX, "a.npy": MATRIX + 1, "": MATRIX + 2, "é/../x": MATRIX + 3}
    jlora.save_arrays(tmp_path / "w.npz", arrays)
    assert_holds(open_checkpoint(tmp_path / "w.npz"), arrays)


def read_with_peak(checkpoint, name, start, stop):
    tracemalloc.start()
    rows = checkpoint.read_rows(name, start, stop)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return rows, peak


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_big_member_need_the_memory_of_the_rows(tmp_path, save, order):
    big = np.arange(1_000_000, dtype=np.float32).reshape(1000, 1000)
    save(tmp_path / "w.npz", a=big[:2], w=np.asarray(big, order=order))
    checkpoint = open_checkpoint(tmp_path / "w.npz")
    rows, peak = read_with_peak(checkpoint, "w", 100, 120)
    assert np.array_equal(rows, big[100:120])
    blocks = 0 if save is np.savez else 400_000  # 64 KiB each, and the state of zlib
    assert peak < 1.1 * rows.nbytes + 20_000 + blocks
    whole, peak = read_with_peak(checkpoint, "w", 0, None)
    assert np.array_equal(whole, big)
    assert peak < 1.1 * whole.nbytes + blocks


def test_rows_of_a_stored_member_are_read_by_their_bytes(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as file, file.open("w.npy", "w") as member:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (1000, 100_000)}
        )
        member.write(header.getvalue())
        block = bytes(4_000_000)
        for _ in range(100):
            member.write(block)
    checkpoint = open_checkpoint(path)
    before = os.times().user
    rows, peak = read_with_peak(checkpoint, "w", 998, None)
    assert rows.shape == (2, 100_000)
    assert peak < 1.1 * rows.nbytes + 20_000
    assert os.times().user - before < 0.1  # 400 MB lie in front of them


def test_ten_thousand_members(tmp_path):
    path = tmp_path / "w.npz"
    jlora.save_arrays(path, {f"w{i}": np.full(4, i) for i in range(10_000)})
    checkpoint = open_checkpoint(path)
    assert len(checkpoint) == 10_000
    assert checkpoint["w77"].tolist() == [77] * 4


def test_a_file_that_changes_is_noticed(tmp_path):
    for name in ("w.npy", "w.npz"):
        jlora.save_arrays(tmp_path / name, {"w": np.ones(2)})
        checkpoint = open_checkpoint(tmp_path / name)
        jlora.save_arrays(tmp_path / name, {"w": np.ones(3)})
        with pytest.raises(ValueError, match="must not change while it is open"):
            checkpoint["w"]


def damage(path, position, value):
    """Change one byte in place; the time of the file is kept."""
    status = os.stat(path)
    content = bytearray(path.read_bytes())
    content[position] = value
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_checksum_is_compared_when_an_array_is_read_whole(tmp_path, save):
    path = tmp_path / "w.npz"
    array = np.arange(1000.0).reshape(10, 100)
    save(path, w=array)
    checkpoint = open_checkpoint(path)
    damage(path, path.stat().st_size // 2, 77)
    with pytest.raises(ValueError, match=r"w\.npz: must be a whole \.npz file"):
        checkpoint["w"]
    with pytest.raises(ValueError, match=r"w\.npz: must be a whole \.npz file"):
        jlora.load_arrays(path)


def test_objects_and_devices_are_refused(tmp_path):
    objects = np.array([{}], dtype=object)
    np.save(tmp_path / "w.npy", objects)
    np.savez(tmp_path / "w.npz", w=objects)
    for name in ("w.npy", "w.npz"):
        with pytest.raises(ValueError, match="Python objects, which are never unpic"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "zero.npy").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="must be a regular file"):
        open_checkpoint(tmp_path / "zero.npy")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "gone.npz")


def test_items_that_are_arrays_are_refused(tmp_path):
    text = b"{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (2,)}"
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
    (tmp_path / "w.npy").write_bytes(header + bytes(16))
    with pytest.raises(ValueError, match="are arrays themselves"):
        open_checkpoint(tmp_path / "w.npy")


def test_members_outside_of_their_file(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, w=np.arange(100.0))
    content = path.read_bytes()
    central = content.index(b"PK\x01\x02")
    for offset, text in ((20, "larger than the file"), (24, "claims")):
        mutant = bytearray(content)
        mutant[central + offset : central + offset + 4] = struct.pack("<I", 10**6)
        path.write_bytes(mutant)
        with pytest.raises(ValueError, match=rf"w\.npz: .*{text}"):
            open_checkpoint(path)


def make_models(folder, suffix):
    """Write two models whose one matrix differs by a matrix of ones."""
    base, tuned = folder / f"base{suffix}", folder / f"tuned{suffix}"
    w = RNG.standard_normal((6, 4)).astype(np.float32)
    jlora.save_arrays(base, {"layers.0.q.weight": w})
    jlora.save_arrays(tuned, {"layers.0.q.weight": w + 1})
    return base, tuned


def test_the_difference_of_two_archives_is_extracted(tmp_path):
    settings = {"rank": 1, "key": jax.random.key(0), "progress": False}
    found = {}
    for suffix in (".npz", ".safetensors"):
        base, tuned = make_models(tmp_path, suffix)
        extract_checkpoint(base, tuned, tmp_path / f"adapter{suffix}", **settings)
        factors, _ = jlora.load_peft(tmp_path / f"adapter{suffix}")
        found[suffix] = factors["layers.0.q"]
    for pair in found.values():
        np.testing.assert_allclose(pair.u @ pair.v, np.ones((4, 6)), atol=1e-5)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_merge_and_init_ask_for_safetensors(tmp_path, suffix):
    base = tmp_path / f"w{suffix}"
    jlora.save_arrays(base, {"w": MATRIX})
    text = rf"w{suffix}: must be a \.safetensors file .* with save_arrays first"
    with pytest.raises(ValueError, match=text):
        initialize_checkpoint(
            base, tmp_path / "new", rank=2, key=jax.random.key(0), progress=False
        )
    pair = jlora.Factors(np.ones((5, 1), np.float32), np.ones((1, 7), np.float32))
    jlora.save_peft(tmp_path / "adapter", {"w": pair})
    with pytest.raises(ValueError, match=text):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
