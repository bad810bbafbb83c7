"""The record of one contender: its times and errors, beside its group and machine."""

import datetime
import functools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax

from benchmarks.run.contenders import Contender, Group, Level, Prepared
from benchmarks.run.environment import describe_environment, measure_load
from benchmarks.run.records import SCHEMA_VERSION


class Outcome(NamedTuple):
    """The times and errors of one contender, or the reason why it has none."""

    status: str  # measured | skipped | failed
    reason: str | None = None  # of a contender that was not measured
    prepared: Prepared | None = None
    errors: dict[str, float] | None = None  # {kind: value}
    times_ms: Sequence[float] = ()
    rounds: Sequence[int] = ()  # the interleaved round of each time


def make_record(
    group: Group,
    contender: Contender,
    level: Level,
    limits,
    outcome: Outcome,
    others_cores: float | None = None,
) -> dict:
    """Return the record of one contender's outcome.

    Args:
        limits: The `Limits` that the floor is computed from.
        others_cores: Cores that other processes kept busy during the group.
    """
    prepared, times_ms = outcome.prepared, outcome.times_ms
    memory = jax.devices()[0].memory_stats() or {}
    limit = limits.describe(group.case.dtype, group.precision)
    floor_ms = _compute_floor(group, limit)
    median = statistics.median(times_ms) if times_ms else None

    return {
        "schema": SCHEMA_VERSION,
        "time": get_start_time(),
        "level": level.name,
        "suite": group.suite,
        "operation": group.operation,
        "implementation": contender.name,
        "role": contender.role,
        "setting": contender.setting,
        "case": group.case.describe(),
        "status": outcome.status,
        "reason": outcome.reason,
        "lower_ms": prepared and prepared.lower_ms,
        "compile_ms": prepared and prepared.compile_ms,
        "times_ms": [round(value, 4) for value in times_ms],
        "rounds": list(outcome.rounds),
        "peak_bytes": prepared and prepared.peak_bytes,
        "temporary_bytes": prepared and prepared.temporary_bytes,
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
        "errors": outcome.errors or {},
        "flops": group.flops,
        "bytes": group.bytes,
        "floor_ms": floor_ms,
        "fraction_of_limit": floor_ms / median if floor_ms and median else None,
        "limits": limit,
        "load": measure_load(),
        "others_cores": others_cores,
        **describe_environment(),
    }


def make_timed_record(
    group: Group, contender: Contender, level: Level, limits, times_ms: Sequence[float]
) -> dict:
    """Return the record of a contender that was timed outside the harness."""
    rounds = range(len(times_ms))
    outcome = Outcome("measured", times_ms=times_ms, rounds=rounds)
    return make_record(group, contender, level, limits, outcome)


@functools.cache
def get_start_time() -> str:
    """Return the time of the first call, in UTC, which all records of a run share."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def name_output(level: str) -> str:
    """Return the name of a new file of records: start time, commit, level."""
    stamp = get_start_time().replace("-", "").replace(":", "").split("+")[0]
    return f"{stamp}-{describe_environment()['commit'][:8]}-{level}.jsonl"


def _compute_floor(group, limit):
    """Return the least time in ms that the limits allow, None if it is unknown."""
    if not limit or (group.flops is None and group.bytes is None):
        return None
    seconds = max(
        (group.flops or 0) / limit["flops_per_s"],
        (group.bytes or 0) / limit["bytes_per_s"],
    )
    return 1e3 * seconds
