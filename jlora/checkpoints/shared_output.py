"""Several processes that write one output folder: each its part, the last one the rest.

The processes share a file system, and nothing else: files that are whole, one record of
them for each process, and locks (`flock`) that the system frees when a process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jlora import _checks
from jlora._processes import (
    check_same,
    count_processes,
    is_first_process,
    raising_on_all,
    wait_for_all,
)
from jlora.checkpoints.adapter_ranks import AdapterReport, share_report
from jlora.checkpoints.output_folder import (
    LOCK,
    PROCESS_LOCKS,
    OutputFolder,
    check_space,
    finishing,
    hold_lock,
    make_partial,
    name_partial,
    open_output,
)

_WAIT = 0.2  # seconds between two looks at the files of other processes
_NUM_TRIES = 20  # to take a lock that another process may hold for a short look

Result = TypeVar("Result")


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
        self._progress_name = f".progress-{part.index}.json"
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
        self.rest()
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
        before = [job for job, _ in self._list_progress()]
        self._refuse_other(before)
        self._write_progress()
        # Another process may have begun another job since the first look.
        try:
            self._refuse_other([job for job, _ in self._list_progress()])
        except ValueError:
            (self.path / self._progress_name).unlink()
            raise

    def _refuse_other(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            if job != self._job:
                names = [key for key in self._job if job.get(key) != self._job[key]]
                raise ValueError(
                    f"{self.path}: must hold parts of this job, got those of another "
                    f"one with a different {', '.join(names)}. Pass the same arguments "
                    "to all processes, or remove that folder."
                )


def choose_part(process: tuple[int, int] | None) -> Part:
    """Return the part of this process: the given one, or by `jax.distributed`."""
    if process is None:
        count = count_processes()
        if count == 1:
            return Part(0, 1, False)
        import jax

        return Part(jax.process_index(), count, True)
    if not isinstance(process, tuple) or len(process) != 2:
        raise TypeError(
            "`process` must be a tuple (index, count), got "
            f"{type(process).__name__}. Pass for example (0, 4)."
        )
    index, count = (
        _checks.check_integer(number, "process", minimum=0) for number in process
    )
    if index >= count:
        raise ValueError(
            "`process` must be (index, count) with an index below the count, got "
            f"({index}, {count}). Number the processes from 0."
        )
    return Part(index, count, False)


def run_shared(
    place: JobFolder,
    part: Part,
    first: Sequence[str],
    do_part: Callable[[OutputFolder], Any],
    do_all: Callable[[OutputFolder], Result],
) -> Result | None:
    """Return the result of a job, or None if other processes have work left.

    Args:
        place: of the folder to write.
        part: of this process.
        first: the files of the first stage, which the processes share out. Whoever
            finds all of them whole, and nobody at work, does the rest.
        do_part: writes the files of this process.
        do_all: writes everything that is missing, and returns the result.
    """
    if part.count == 1:
        with open_output(
            place.target, inputs=place.inputs, num_bytes=place.num_bytes, job=place.job
        ) as folder:
            return do_all(folder)
    if part.is_joint:
        return _run_joint(place, part, first, do_part, do_all)
    with _open_part(place, part) as folder:
        do_part(folder)
    return _do_rest(place, first, do_all)


def choose_report(report: AdapterReport | None, part: Part) -> AdapterReport:
    """Return the report of a job: on all joint processes, empty if work is left."""
    if part.is_joint:
        return share_report(report)
    return AdapterReport(()) if report is None else report


def _run_joint(
    place: JobFolder,
    part: Part,
    first: Sequence[str],
    do_part: Callable[[OutputFolder], Any],
    do_all: Callable[[OutputFolder], Result],
) -> Result | None:
    """Run a job by all processes of `jax.distributed`; the first has the result.

    An error of one of them is raised on all.
    """
    check_same(json.dumps(place.job), "arguments", "Pass the same to all of them.")
    with contextlib.ExitStack() as stack:
        with raising_on_all():
            folder = stack.enter_context(_open_part(place, part))
        with raising_on_all():
            do_part(folder)
            # Not in a collective, which may have a time limit.
            folder.wait_until_idle()
    wait_for_all("the parts are written")

    with raising_on_all():
        result = _do_rest(place, first, do_all) if is_first_process() else None
        if is_first_process() and result is None:
            raise ValueError(
                f"{place.target}: must be written by one job at a time, got another "
                "one at work. Wait for it, or choose another folder."
            )
    return result


@contextlib.contextmanager
def _open_part(place: JobFolder, part: Part) -> Iterator[SharedFolder]:
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


def _do_rest(
    place: JobFolder, first: Sequence[str], do_all: Callable[[OutputFolder], Result]
) -> Result | None:
    """Complete the job if its first stage is whole and no process is at work."""
    target = pathlib.Path(place.target).absolute()
    partial = name_partial(target)
    try:
        with hold_lock(partial / LOCK) as is_held:
            if not is_held:
                return None
            folder = OutputFolder(partial, place.job)
            if not all(map(folder.has, first)):
                return None
            folder.remove_others()
            with finishing(partial, target):
                return do_all(folder)
    except FileNotFoundError:
        if not target.exists():
            raise
        return None  # another process has completed it
