"""A folder that appears whole: written beside its place, resumable, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jlora.checkpoints.files import describe_kind, replace_file
from jlora.checkpoints.json_files import read_json, write_json
from jlora.checkpoints.locks import hold_lock

_PROGRESS = ".progress.json"
_PROGRESS_FILES = ".progress*.json"
LOCK = ".lock"  # of the folder: shared by processes of one job, or of one run
PROCESS_LOCKS = ".process-*.lock"  # each of a process at work on its part


class OutputFolder:
    """The folder while it is written; see `open_output`."""

    _progress_name = _PROGRESS

    def __init__(self, partial: pathlib.Path, job: Mapping[str, Any]) -> None:
        self.path = partial
        self._job = json.loads(json.dumps(job))
        self._done: dict[str, int] = self._read_done()

    def has(self, name: str) -> bool:
        """Return whether a file is whole, from this run or an interrupted one."""
        path = self.path / name
        return path.is_file() and path.stat().st_size == self._done.get(name)

    def owns(self, number: int, count: int) -> bool:
        """Return whether one of `count` pieces of work is for this process."""
        return True

    def wait_for(self, names: Sequence[str]) -> bool:
        """Return whether these files are whole, after the processes that write them."""
        return all(map(self.has, names))

    def write(
        self, name: str, write: Callable[[BinaryIO], None], *, again: bool = False
    ) -> bool:
        """Write a file, unless it is whole already and need not be written again.

        Returns:
            Whether it was written now.
        """
        if self.has(name) and not again:
            return False
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            write(file)
        self._done[name] = path.stat().st_size
        self._write_progress()
        return True

    def drop(self, name: str) -> None:
        """Remove a folder that the result does not need."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_others(self) -> None:
        """Remove everything but the whole files of interrupted runs of this job."""
        self._write_progress()  # first: it is the record of the files to keep
        records = [name for name, job, _ in self.list_records() if job == self._job]
        kept = {*self._done, *records, LOCK}
        for entry in self.path.rglob("*"):
            is_folder = entry.is_dir() and not entry.is_symlink()
            is_process_lock = entry.match(PROCESS_LOCKS)
            name = str(entry.relative_to(self.path))
            if not (is_folder or is_process_lock or name in kept):
                entry.unlink()

    def _write_progress(self) -> None:
        with replace_file(self.path / self._progress_name) as file:
            write_json(file, {"job": self._job, "done": self._done})

    def _read_done(self) -> dict[str, int]:
        """Return {file: bytes} that the runs of this job have written."""
        done: dict[str, int] = {}
        for _, job, files in self.list_records():
            if job == self._job:
                done |= files
        return done

    def list_records(self) -> Iterator[tuple[str, Any, dict[str, int]]]:
        """Yield (name, job, {file: bytes}) of each process; damaged ones are left out.

        A record is the file in which a process says which files it has written.
        """
        for path in sorted(self.path.glob(_PROGRESS_FILES)):
            with contextlib.suppress(
                ValueError, KeyError, TypeError, AttributeError, FileNotFoundError
            ):
                progress = read_json(path)
                done = {str(k): int(v) for k, v in progress["done"].items()}
                yield path.name, progress["job"], done


@contextlib.contextmanager
def open_output(
    target: str | os.PathLike[str],
    *,
    inputs: Sequence[pathlib.Path],
    num_bytes: int,
    job: Mapping[str, Any],
) -> Iterator[OutputFolder]:
    """Yield a folder that is renamed to `target` if the block succeeds.

    It lies beside `target` as `.NAME.partial`, and stays there if the block is
    interrupted or the disk is full, so that the same job goes on from the files that
    are whole. After a ValueError it is removed.

    Args:
        target: the folder to make; it must not exist.
        inputs: files and folders that are read, none of which may hold the target.
        num_bytes: what will be written, for a check of the free space.
        job: what decides the result; a partial folder of another job is begun anew.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the target exists, lies within an input or in no folder, another run
            writes it, or the disk has too little space.
    """
    target = pathlib.Path(target).absolute()
    partial = make_partial(target, inputs)
    with hold_lock(partial / LOCK) as is_held:
        if not is_held:
            raise ValueError(
                f"{target}: must be written by one run at a time, got another run at "
                "work. Wait for it, or choose another folder."
            )

        folder = OutputFolder(partial, job)
        folder.remove_others()
        check_space(target, partial, num_bytes)
        with finishing(partial, target):
            yield folder


def make_partial(target: pathlib.Path, inputs: Sequence[pathlib.Path]) -> pathlib.Path:
    """Return the folder beside a checked target in which it is written."""
    check_target(target, inputs)
    partial = name_partial(target)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise ValueError(
            f"{partial}: must be a folder of an earlier run, got another. Remove it."
        )
    partial.mkdir(exist_ok=True)
    return partial


def name_partial(target: pathlib.Path) -> pathlib.Path:
    """Return the path of the folder in which a target is written."""
    return target.parent / f".{target.name}.partial"


@contextlib.contextmanager
def finishing(partial: pathlib.Path, target: pathlib.Path) -> Iterator[None]:
    """Rename the folder after the block; remove it after a ValueError."""
    try:
        yield
    except ValueError:  # of the inputs: going on would not help
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _finish(partial, target)


def check_target(target: pathlib.Path, inputs: Sequence[pathlib.Path]) -> None:
    """Refuse a folder to write that exists, or that lies within an input."""
    if target.exists() or target.is_symlink():
        raise ValueError(
            f"{target}: must be a folder that does not exist yet, got "
            f"{describe_kind(target)}. Choose another path, or remove it."
        )
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(
            f"{target}: must lie in a folder that can be written to, got none. "
            "Choose another path."
        )
    for path in inputs:
        home = path.resolve()
        if target.resolve().is_relative_to(home):
            raise ValueError(
                f"{target}: must lie outside of the inputs, got a path within {path}. "
                "Choose another path."
            )


def copy_range(source: int, file: BinaryIO, start: int, num_bytes: int) -> None:
    """Append a byte range of an open file, in the kernel where the system can."""
    file.flush()
    while num_bytes:
        try:
            count = os.copy_file_range(source, file.fileno(), num_bytes, start)
        except OSError:
            count = file.write(os.pread(source, min(num_bytes, 2**23), start))
            file.flush()
        if not count:
            raise ValueError("an input file ended before its last tensor")
        start, num_bytes = start + count, num_bytes - count


def copy_file(path: pathlib.Path, file: BinaryIO) -> None:
    """Append the bytes of a file."""
    with open(path, "rb") as source:
        copy_range(source.fileno(), file, 0, path.stat().st_size)


def identify(path: pathlib.Path) -> list[Any]:
    """Return what tells whether a file, or a folder of some, is still the same."""
    if path.is_dir():
        files = (each for each in sorted(path.rglob("*")) if each.is_file())
        return [identify(each) for each in files]
    status = path.stat()
    with open(path, "rb") as file:
        start = hashlib.sha256(file.read(2**16)).hexdigest()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, start]


def write_array(file: BinaryIO, array: np.ndarray) -> None:
    """Append the bytes of an array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    file.write(flat.view(np.uint8).data)


def _finish(partial: pathlib.Path, target: pathlib.Path) -> None:
    for pattern in (_PROGRESS_FILES, PROCESS_LOCKS, LOCK):
        for path in partial.glob(pattern):
            path.unlink(missing_ok=True)
    for entry in (partial, *partial.rglob("*")):
        if entry.is_dir():
            _flush_folder(entry)
    os.rename(partial, target)
    _flush_folder(target.parent)


def _flush_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(target: pathlib.Path, partial: pathlib.Path, num_bytes: int) -> None:
    status = os.statvfs(partial)
    free = status.f_bavail * status.f_frsize
    files = (entry for entry in partial.rglob("*") if entry.is_file())
    there = sum(entry.stat().st_size for entry in files if entry.name[0] != ".")
    needed = num_bytes + num_bytes // 100 - there
    if needed > free:
        raise ValueError(
            f"{target}: must have room for {needed} bytes, got {free} free. Free some "
            "space."
        )
