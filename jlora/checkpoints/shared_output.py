"""Several processes that write one output folder: each its part, the last one the rest.

The processes share a file system, and nothing else: files that are whole, one record of
them for each process, and locks (`flock`) that the system frees when a process ends.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jlora.checkpoints.locks import hold_lock
from jlora.checkpoints.output_folder import (
    LOCK,
    PROCESS_LOCKS,
    OutputFolder,
    check_space,
    make_partial,
)

_WAIT = 0.2  # seconds between two looks at the files of other processes
_NUM_TRIES = 20  # to take a lock that another process may hold for a short look


class Part(NamedTuple):
    """The part of a job for one of several processes."""

    index: int
    count: int
    is_joint: bool  # whether `jax.distributed` runs all of them together


class JobFolder(NamedTuple):
    """The arguments of `open_output`."""

    target: str | os.PathLike[str]
    inputs: Sequence[pathlib.Path]
    num_bytes: int
    job: Mapping[str, Any]


class SharedFolder(OutputFolder):
    """The folder for one process of several; see `open_part`."""

    def __init__(self, partial: pathlib.Path, job: Mapping[str, Any], part: Part):
        self._part = part
        self._progress_name = name_record(part.index)
        self._lock = contextlib.ExitStack()
        super().__init__(partial, job)

    def has(self, name: str) -> bool:
        """Return whether a file is whole, written by any of the processes."""
        if name not in self._done and (self.path / name).is_file():
            self._done |= self._read_done()
        return super().has(name)

    def owns(self, number: int, count: int) -> bool:
        """Return whether one of `count` pieces of work is for this process.

        The pieces of a process follow each other, as do the tensors of a file.
        """
        index, num_parts, _ = self._part
        return count * index // num_parts <= number < count * (index + 1) // num_parts

    def wait_for(self, names: Sequence[str]) -> bool:
        """Return whether these files are whole, after the processes that write them.

        It waits while another process is at work, and not for one that is not there.
        """
        self.rest()
        while not all(map(self.has, names)) and self.is_another_at_work():
            time.sleep(_WAIT)
        self.work()
        return all(map(self.has, names))

    def wait_until_idle(self) -> None:
        """Wait until no other process is at work."""
        while self.is_another_at_work():
            time.sleep(_WAIT)

    def work(self) -> None:
        """Show the other processes that this one is at work."""
        path = self.path / PROCESS_LOCKS.replace("*", str(self._part.index))
        if not self._lock.enter_context(hold_lock(path, num_tries=_NUM_TRIES)):
            index, count, _ = self._part
            raise ValueError(
                f"{self.path}: `process` must be another one for each process, got "
                f"{index} of {count}, which is at work. Number them from 0."
            )

    def rest(self) -> None:
        """Show the other processes that this one is not at work."""
        self._lock.close()

    def is_another_at_work(self) -> bool:
        """Return whether a lock of another process is held."""
        for path in self.path.glob(PROCESS_LOCKS):
            with (
                contextlib.suppress(FileNotFoundError),
                hold_lock(path, is_shared=True) as is_free,
            ):
                if not is_free:
                    return True
        return False

    def join_job(self) -> None:
        """Record this process, or refuse files of another job."""
        self._refuse_other()
        self._write_progress()
        try:
            # Another process may have begun another job since the first look.
            self._refuse_other()
        except ValueError:
            (self.path / self._progress_name).unlink()
            raise

    def _refuse_other(self) -> None:
        for _, job, _ in self.list_records():
            if job != self._job:
                names = [key for key in self._job if job.get(key) != self._job[key]]
                raise ValueError(
                    f"{self.path}: must hold parts of this job, got those of another "
                    f"one with a different {', '.join(names)}. Pass the same arguments "
                    "to all processes, or remove that folder."
                )


@contextlib.contextmanager
def open_part(place: JobFolder, part: Part) -> Iterator[SharedFolder]:
    """Yield the folder for the part of one process; it stays when the block ends."""
    target = pathlib.Path(place.target).absolute()
    partial = make_partial(target, place.inputs)
    lock = hold_lock(partial / LOCK, is_shared=True, num_tries=_NUM_TRIES)
    with lock as is_held:
        if not is_held:
            raise ValueError(
                f"{target}: must be written by one run at a time, got another run at "
                "work. Wait for it, or choose another folder."
            )

        folder = SharedFolder(partial, place.job, part)
        folder.work()
        try:
            folder.join_job()
            check_space(target, partial, place.num_bytes)
            yield folder
        finally:
            folder.rest()


def name_record(index: int) -> str:
    """Return the file in which a process says which files it has written."""
    return f".progress-{index}.json"
