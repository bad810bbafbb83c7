"""Readers meet damaged and hostile files: only ValueError or OSError, with the name."""

import io
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

import jlora

NUM_MUTANTS = 500  # of each format


def write_header(path, text, data=b""):
    """Write a .npy file with this text for its header."""
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)


def read(path):
    """Return the message of the refusal, which must name the file, or the arrays."""
    try:
        return jlora.load_arrays(path)
    except (ValueError, OSError) as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message
    return message


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}"
HEADERS = {
    "open bracket": "{'descr': '<f4', 'fortran_order': False, 'shape': (3,(}",
    "indentation": "\n  {'descr'\n:1",
    "tuple dtype": "{'descr': ('<f4',), 'fortran_order': False, 'shape': (2,)}",
    "huge shape": "{'descr': '<f4', 'fortran_order': False, 'shape': (10**30,)}",
    "huge number": GOOD.replace("(2,)", "(" + "9" * 40 + ",)"),
    "hundred terabytes": GOOD.replace("(2,)", "(100000000000000,)"),
    "empty beside huge": GOOD.replace("(2,)", "(0, " + "9" * 40 + ")"),
    "bool in the shape": GOOD.replace("(2,)", "(True, 2)"),
    "negative": GOOD.replace("(2,)", "(-1, -2)"),
    "list shape": GOOD.replace("(2,)", "[2]"),
    "integer key": "{1: 2, 'fortran_order': False, 'shape': (2,)}",
    "no dict": "3",
    "call": "__import__('os').system('true')",
    "nested": "[" * 5000,
    "zero bytes": GOOD.replace("<f4", "V0"),
    "objects": GOOD.replace("<f4", "|O"),
    "unknown dtype": GOOD.replace("<f4", "<q77"),
    "not text": b"\xff\xfe\x00\x01",
    "too few bytes": GOOD.replace("(2,)", "(3,)"),
    "too many bytes": GOOD.replace("(2,)", "(1,)"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_npy_files(tmp_path, name):
    path = tmp_path / "w.npy"
    write_header(path, HEADERS[name], bytes(8))
    assert "must be a whole .npy file of plain arrays" in read(path)

    # The same as a member of an archive.
    archive = tmp_path / "w.npz"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(path, "w.npy")
    assert "must be a whole .npz file of plain arrays" in read(archive)


def test_memory_stays_within_the_file(tmp_path):
    path = tmp_path / "w.npy"
    write_header(path, HEADERS["hundred terabytes"], bytes(1000))
    tracemalloc.start()
    read(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6

    array = np.zeros(10**6, np.float32)
    jlora.save_arrays(path, array)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    jlora.load_arrays(path)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 1.1 * array.nbytes


def make_archive(**settings):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", **settings) as file:
        member = io.BytesIO()
        np.save(member, np.arange(50.0))
        file.writestr("w.npy", member.getvalue())
    return bytearray(data.getvalue())


def test_members_that_are_encrypted_or_compressed_otherwise(tmp_path):
    path = tmp_path / "w.npz"
    encrypted = make_archive()
    central = encrypted.index(b"PK\x01\x02")
    encrypted[central + 8] |= 1
    path.write_bytes(encrypted)
    assert "is encrypted" in read(path)

    method = make_archive()
    central = method.index(b"PK\x01\x02")
    method[central + 10] = 99
    path.write_bytes(method)
    assert "compressed by a method" in read(path)

    path.write_bytes(make_archive(compression=zipfile.ZIP_LZMA))
    assert "compressed by a method" in read(path)
    path.write_bytes(make_archive(compression=zipfile.ZIP_DEFLATED))
    assert read(path)["w"].tolist() == list(range(50))


def test_a_member_that_claims_more_than_it_can_hold(tmp_path):
    path = tmp_path / "w.npz"
    bomb = make_archive(compression=zipfile.ZIP_DEFLATED)
    central = bomb.index(b"PK\x01\x02")
    bomb[central + 24 : central + 28] = struct.pack("<I", 2**31)
    path.write_bytes(bomb)
    assert "claims 2147483648 bytes" in read(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_mutants(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
    if suffix != ".npy":
        arrays["b"] = np.ones(3, np.int16)
    jlora.save_arrays(path, arrays)
    original = path.read_bytes()

    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(NUM_MUTANTS):
        mutant = bytearray(original)
        kind = rng.integers(3)
        for _ in range(rng.integers(1, 5)):
            mutant[rng.integers(len(mutant))] = rng.integers(256)
        if kind == 1:
            del mutant[rng.integers(len(mutant)) :]
        elif kind == 2:
            mutant += rng.bytes(rng.integers(1, 20))
        path.write_bytes(mutant)
        num_refused += isinstance(read(path), str)
    assert num_refused > NUM_MUTANTS / 4  # the rest changes numbers or names only


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", "<f4", ">f2"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_foreign_byte_orders_are_swapped(tmp_path, dtype, suffix):
    path = tmp_path / f"w{suffix}"
    array = np.arange(6).astype(dtype).reshape(2, 3)
    (np.save if suffix == ".npy" else np.savez)(path, array)
    (found,) = jlora.load_arrays(path).values()
    assert found.dtype.isnative
    assert (found == array).all()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "int4", "float4_e2m1fn", "bfloat16", "float16"],
)
def test_small_dtypes_are_kept_or_refused(tmp_path, dtype, suffix):
    path = tmp_path / f"w{suffix}"
    array = np.ones((2, 3)).astype(getattr(ml_dtypes, dtype, dtype))
    kept = {".safetensors": ("float8_e4m3fn", "float8_e5m2")}.get(suffix, ())
    if dtype not in (*kept, "bfloat16", "float16"):
        with pytest.raises(TypeError, match=f"must have dtypes that .*{dtype}"):
            jlora.save_arrays(path, {"w": array})
        assert not path.exists()
        return

    jlora.save_arrays(path, {"w": array})
    (found,) = jlora.load_arrays(path).values()
    assert found.dtype == array.dtype
    assert (found == array).all()


def test_names_are_kept_or_refused(tmp_path):
    path = tmp_path / "n.npz"
    arrays = {"a": np.zeros(2), "a.npy": np.ones(2), "": np.full(2, 2.0), "x/y": np.e}
    arrays["x/y"] = np.full(2, 3.0)
    jlora.save_arrays(path, arrays)
    found = jlora.load_arrays(path)
    assert {name: array[0] for name, array in found.items()} == {
        "a": 0,
        "a.npy": 1,
        "": 2,
        "x/y": 3,
    }

    for name, error in ((1, TypeError), ("a\0b", ValueError)):
        with pytest.raises(error, match="`arrays` must have names"):
            jlora.save_arrays(path, {name: arrays["a"]})
    with pytest.raises(ValueError, match="__metadata__"):
        jlora.save_arrays(tmp_path / "n.safetensors", {"__metadata__": arrays["a"]})
    with pytest.raises(TypeError, match="must hold NumPy or JAX arrays, got Masked"):
        jlora.save_arrays(path, {"a": np.ma.masked_array([1.0, 2.0], [True, False])})


def test_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    member = io.BytesIO()
    np.save(member, np.ones(2))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w.npy", member.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("w.npy", member.getvalue())
    assert "it holds 'w' twice" in read(path)


def test_a_folder_or_a_device_is_no_file_of_arrays(tmp_path):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "null.npy").symlink_to("/dev/zero")
    for name in ("folder.npy", "null.npy"):
        assert "must be a regular file" in read(tmp_path / name)
