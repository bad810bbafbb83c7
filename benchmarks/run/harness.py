"""Groups of contenders timed in turns on one problem, each result checked beside its time."""

import datetime
import functools
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.run.cases import Case
from benchmarks.run.environment import (
    count_others_cores,
    describe_environment,
    measure_load,
    read_processor_seconds,
    why_missing,
)
from benchmarks.run.records import SCHEMA_VERSION


class Prepared(NamedTuple):
    """A contender with its inputs on the device, compiled and ready to be run."""

    run: Callable[[], Any]  # one run; everything has been computed when it returns
    fetch: Callable[[Any], Any]  # its result → NumPy arrays, outside the clock
    lower_ms: float | None = None
    compile_ms: float | None = None
    peak_bytes: int | None = None
    temporary_bytes: int | None = None
    pool: str = "xla"  # whose threads run it: xla | torch | blas


class Contender(NamedTuple):
    """One implementation of an operation at one setting."""

    name: str
    prepare: Callable[..., Prepared]  # of the group's inputs
    role: str = "peer"  # jlora | peer
    setting: str = "defaults"
    requires: tuple[str, ...] = ()  # modules that have to be installed
    most_runs: int | None = None  # None: as many as the level allows
    least_runs: int = 1  # however long they take
    skip: str | None = None  # why it is not to be measured here


class Group(NamedTuple):
    """One problem and everybody who solves it, timed in turns."""

    suite: str
    operation: str
    case: Case
    make_inputs: Callable[[], tuple]  # NumPy arrays, made once for the group
    contenders: tuple[Contender, ...]
    # (inputs, result) -> {kind: value}; the first kind is the one to judge by.
    measure_errors: Callable[[tuple, Any], dict]
    flops: float | None = None  # that any implementation needs
    bytes: float | None = None  # that any implementation moves
    precision: str = "highest"  # of the matrix products that the floor is counted in


class Level(NamedTuple):
    """How much is measured."""

    name: str  # quick | full
    most_runs: int
    seconds: float  # for the runs of one contender; at least one run is made


QUICK = Level("quick", 7, 0.6)
FULL = Level("full", 7, 2.5)


# Threads of torch and OpenMP go on spinning for a fifth of a second after their work, and would
# take a core from whoever comes next.
_SETTLE_SECONDS = 0.25


def measure_group(group, level, limits):
    """Return the records of a group: warm-up, then one run of each contender a round."""
    prepared, records = {}, []
    try:
        inputs, no_inputs = group.make_inputs(), None
    except FileNotFoundError as error:  # weights of an optional package
        inputs, no_inputs = (), str(error)
    for contender in group.contenders:
        reason = no_inputs or contender.skip or why_missing(contender.requires)
        if reason is not None:
            records.append(_make_record(group, contender, level, limits, reason=reason))
            continue
        try:
            prepared[contender] = _warm_up(group, contender, inputs, level)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            records.append(
                _make_record(
                    group, contender, level, limits, status="failed", reason=reason
                )
            )
    before, start = read_processor_seconds(), time.perf_counter()
    times = _run_in_turns(prepared, level)
    others = count_others_cores(before, read_processor_seconds(), _seconds_since(start))
    for contender, (ready, errors, *_) in prepared.items():
        rounds, times_ms = zip(*times[contender], strict=True)
        records.append(
            _make_record(
                group,
                contender,
                level,
                limits,
                ready=ready,
                errors=errors,
                times_ms=list(times_ms),
                rounds=list(rounds),
            )
        )
    for record in records:
        record["others_cores"] = others
    order = {contender.name: index for index, contender in enumerate(group.contenders)}
    return sorted(records, key=lambda record: order[record["implementation"]])


def make_timed_record(group, contender, level, limits, times_ms):
    """Return the record of times that were taken elsewhere."""
    return _make_record(
        group, contender, level, limits, times_ms=times_ms, rounds=range(len(times_ms))
    )


def _warm_up(group, contender, inputs, level):
    """Return (prepared, errors of its result, seconds of a run, whether that run counts)."""
    ready = contender.prepare(*inputs)
    start = time.perf_counter()
    result = ready.run()
    seconds = _seconds_since(start)
    errors = group.measure_errors(inputs, ready.fetch(result))
    # A run this long is not repeated, and what first use adds to it is nothing beside it.
    counts = contender.least_runs == 1 and seconds > 2 * level.seconds
    if not counts:
        start = time.perf_counter()
        ready.run()
        seconds = _seconds_since(start)
    return (
        ready,
        {kind: float(value) for kind, value in errors.items()},
        seconds,
        counts,
    )


def _run_in_turns(prepared, level):
    """Return {contender: [(round, ms)]}, one run of each a round while its time lasts."""
    times = {contender: [] for contender in prepared}
    planned = {}
    for contender, (_, _, seconds, counts) in prepared.items():
        most = min(contender.most_runs or level.most_runs, level.most_runs)
        affordable = int(level.seconds / max(seconds, 1e-9))
        planned[contender] = max(contender.least_runs, min(affordable, most))
        if counts:
            planned[contender] = 0
            times[contender].append((-1, 1e3 * seconds))  # not in turn with the others
    pool = "xla"
    for number in range(max(planned.values(), default=0)):
        for contender, (ready, *_) in prepared.items():
            if number < planned[contender]:
                if pool != ready.pool:
                    if pool != "xla":
                        time.sleep(_SETTLE_SECONDS)
                    # Whoever follows another library finds its threads asleep and the caches
                    # full of other things, which made the first of each 1.5 times slower.
                    ready.run()
                pool = ready.pool
                start = time.perf_counter()
                ready.run()
                times[contender].append((number, 1e3 * _seconds_since(start)))
    return times


def _seconds_since(start):
    return time.perf_counter() - start


def _make_record(
    group,
    contender,
    level,
    limits,
    *,
    status=None,
    reason=None,
    ready=None,
    errors=None,
    times_ms=(),
    rounds=(),
):
    floor_ms = _measure_floor(group, limits)
    median = statistics.median(times_ms) if times_ms else None
    return {
        "schema": SCHEMA_VERSION,
        "time": start_of_run(),
        "level": level.name,
        "suite": group.suite,
        "operation": group.operation,
        "implementation": contender.name,
        "role": contender.role,
        "setting": contender.setting,
        "case": group.case.describe(),
        "status": status or ("measured" if times_ms else "skipped"),
        "reason": reason,
        "lower_ms": ready and ready.lower_ms,
        "compile_ms": ready and ready.compile_ms,
        "times_ms": [round(value, 4) for value in times_ms],
        "rounds": list(rounds),
        "peak_bytes": ready and ready.peak_bytes,
        "temporary_bytes": ready and ready.temporary_bytes,
        "device_peak_bytes": (jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use"
        ),
        "errors": errors or {},
        "flops": group.flops,
        "bytes": group.bytes,
        "floor_ms": floor_ms,
        "fraction_of_limit": floor_ms / median if floor_ms and median else None,
        "limits": limits.describe(group.case.dtype, group.precision),
        "load": measure_load(),
        "others_cores": None,
        **describe_environment(),
    }


def _measure_floor(group, limits):
    limit = limits.describe(group.case.dtype, group.precision)
    if not limit or (group.flops is None and group.bytes is None):
        return None
    seconds = max(
        (group.flops or 0) / limit["flops_per_s"],
        (group.bytes or 0) / limit["bytes_per_s"],
    )
    return 1e3 * seconds


@functools.cache
def start_of_run():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
