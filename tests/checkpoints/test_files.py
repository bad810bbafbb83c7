"""Files that are written completely or not at all, whatever stands at their path."""

import concurrent.futures
import os
import resource
import stat

import numpy as np
import pytest

import jlora

ARRAY = np.arange(1000.0)


def test_writers_on_one_path_all_succeed(tmp_path):
    path = tmp_path / "w.npz"

    def write(number):
        jlora.save_arrays(path, {"w": np.full(2000, float(number))})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(80)))
    (found,) = jlora.load_arrays(path).values()
    assert len(set(found.tolist())) == 1
    assert os.listdir(tmp_path) == ["w.npz"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o444, 0o640])
def test_a_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "w.npy"
    jlora.save_arrays(path, ARRAY)
    path.chmod(mode)
    jlora.save_arrays(path, ARRAY + 1)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert jlora.load_arrays(path)["w"][0] == 1


def test_a_new_file_has_the_mode_of_any_other(tmp_path):
    jlora.save_arrays(tmp_path / "w.npy", ARRAY)
    (tmp_path / "other").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("w.npy", "other")}
    assert len(modes) == 1


def make_pipe(path):
    os.mkfifo(path)
    return "a pipe"


def make_folder(path):
    path.mkdir()
    return "a folder"


def make_link_to_device(path):
    path.symlink_to("/dev/null")
    return "a device"


@pytest.mark.parametrize("make", [make_pipe, make_folder, make_link_to_device])
def test_what_is_no_regular_file_is_refused(tmp_path, make):
    path = tmp_path / "w.npy"
    kind = make(path)
    before = os.lstat(path)
    with pytest.raises(ValueError, match=f"a regular file or a new one, got {kind}"):
        jlora.save_arrays(path, ARRAY)
    assert os.lstat(path).st_mode == before.st_mode
    assert os.listdir(tmp_path) == ["w.npy"]


def test_a_link_to_itself_and_a_missing_folder_are_refused(tmp_path):
    (tmp_path / "w.npy").symlink_to(tmp_path / "w.npy")
    with pytest.raises(OSError, match=r"w\.npy"):
        jlora.save_arrays(tmp_path / "w.npy", ARRAY)
    assert (tmp_path / "w.npy").is_symlink()
    with pytest.raises(ValueError, match="must be a file in a folder"):
        jlora.save_arrays(tmp_path / "missing" / "w.npy", ARRAY)


def test_a_link_to_a_file_is_followed(tmp_path):
    jlora.save_arrays(tmp_path / "target.npy", ARRAY)
    (tmp_path / "w.npy").symlink_to("target.npy")
    jlora.save_arrays(tmp_path / "w.npy", ARRAY + 1)
    assert (tmp_path / "w.npy").is_symlink()
    assert jlora.load_arrays(tmp_path / "target.npy")["target"][0] == 1


def test_names_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("n" * 251 + ".npy")
    jlora.save_arrays(path, ARRAY)
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "w.npy"
    jlora.save_arrays(path, ARRAY)
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w\.npy"):
            jlora.save_arrays(path, ARRAY + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["w.npy"]
