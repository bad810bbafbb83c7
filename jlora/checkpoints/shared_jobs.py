"""Jobs by several processes: each does its part, and the last one does the rest."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from jlora import _checks
from jlora._processes import (
    check_same,
    count_processes,
    is_first_process,
    raising_on_all,
    wait_for_all,
)
from jlora.checkpoints.adapter_ranks import AdapterReport, share_report
from jlora.checkpoints.locks import hold_lock
from jlora.checkpoints.output_folder import (
    LOCK,
    OutputFolder,
    finishing,
    name_partial,
    open_output,
)
from jlora.checkpoints.shared_output import JobFolder, Part, name_record, open_part

Result = TypeVar("Result")


def choose_part(process: tuple[int, int] | None) -> Part:
    """Return the part of this process: the given one, or by `jax.distributed`."""
    if process is None:
        count = count_processes()
        if count == 1:
            return Part(0, 1, False)
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
        first: the files of the first stage, which the processes share out. The last
            process, which finds all of them whole, does the rest.
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
    with open_part(place, part) as folder:
        do_part(folder)
    return _do_rest(place, part, first, do_all)


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
            folder = stack.enter_context(open_part(place, part))
        with raising_on_all():
            try:
                do_part(folder)
            finally:
                folder.rest()  # or the others would wait for a process that failed
            # Not in a collective, which may have a time limit.
            folder.wait_until_idle()
    wait_for_all("the parts are written")

    with raising_on_all():
        result = _do_rest(place, part, first, do_all) if is_first_process() else None
        if is_first_process() and result is None:
            raise ValueError(
                f"{place.target}: must be written by one job at a time, got another "
                "one at work. Wait for it, or choose another folder."
            )
    return result


def _do_rest(
    place: JobFolder,
    part: Part,
    first: Sequence[str],
    do_all: Callable[[OutputFolder], Result],
) -> Result | None:
    """Complete the job if its first stage is whole and no process is left or at work.

    A process without a share counts too: so the last one to run completes the job.
    """
    target = pathlib.Path(place.target).absolute()
    partial = name_partial(target)
    try:
        with hold_lock(partial / LOCK) as is_held:
            if not is_held:
                return None
            folder = OutputFolder(partial, place.job)
            records = {name for name, _, _ in folder.list_records()}
            has_all = all(name_record(i) in records for i in range(part.count))
            if not has_all or not all(map(folder.has, first)):
                return None

            folder.remove_others()
            with finishing(partial, target):
                return do_all(folder)
    except FileNotFoundError:
        if not target.exists():
            raise
        return None  # another process has completed it
