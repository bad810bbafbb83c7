"""Times the contenders of a group in interleaved rounds, and checks each result."""

import sys
import time
import traceback
from typing import NamedTuple

from benchmarks.run.contenders import Contender, Group, Level, Prepared
from benchmarks.run.environment import (
    count_others_cores,
    read_processor_seconds,
    why_missing,
)
from benchmarks.run.outcomes import Outcome, make_record

# Threads of torch and OpenMP keep spinning for a fifth of a second after their work.
# They would take a core from the next contender.
_SPIN_SECONDS = 0.25


class _Warm(NamedTuple):
    """A contender after its warm-up."""

    prepared: Prepared
    errors: dict[str, float]
    seconds: float  # of one run
    is_timed: bool  # whether that run is its measurement


def measure_group(group: Group, level: Level, limits) -> list[dict]:
    """Return one record for each contender of a group, in the order of the contenders.

    Each contender is warmed up and its result is checked. Then rounds follow, in which
    every contender runs once.

    Args:
        limits: The `Limits` that the floor is computed from.
    """
    inputs, problem = _make_inputs(group)

    outcomes, warm = {}, {}
    for contender in group.contenders:
        reason = problem or contender.skip or why_missing(contender.requires)
        if reason is not None:
            outcomes[contender] = Outcome("skipped", reason)
            continue
        try:
            warm[contender] = _warm_up(group, contender, inputs, level)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            outcomes[contender] = Outcome("failed", _describe_error(error))

    before, start = read_processor_seconds(), time.perf_counter()
    times = _run_rounds(warm, level)
    after, seconds = read_processor_seconds(), _seconds_since(start)
    others_cores = count_others_cores(before, after, seconds)

    for contender, (prepared, errors, *_) in warm.items():
        rounds, times_ms = zip(*times[contender], strict=True)
        outcomes[contender] = Outcome(
            "measured", None, prepared, errors, times_ms, rounds
        )
    return [
        make_record(group, each, level, limits, outcomes[each], others_cores)
        for each in group.contenders
    ]


def _make_inputs(group: Group) -> tuple[tuple, str | None]:
    """Return (inputs, None), or ((), the reason) if an optional package is missing."""
    try:
        return group.make_inputs(), None
    except FileNotFoundError as error:
        return (), str(error)


def _describe_error(error: Exception) -> str:
    """Return an error as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _warm_up(group: Group, contender: Contender, inputs: tuple, level: Level) -> _Warm:
    """Return the `_Warm` contender, its result checked and one run timed."""
    prepared = contender.prepare(*inputs)
    start = time.perf_counter()
    result = prepared.run()
    seconds = _seconds_since(start)
    errors = group.measure_errors(inputs, prepared.fetch(result))
    errors = {kind: float(value) for kind, value in errors.items()}

    # A run this long is not repeated: the overhead of a first run is negligible in it.
    is_timed = contender.least_runs == 1 and seconds > 2 * level.seconds
    if not is_timed:
        start = time.perf_counter()
        prepared.run()
        seconds = _seconds_since(start)
    return _Warm(prepared, errors, seconds, is_timed)


def _run_rounds(warm: dict[Contender, _Warm], level: Level) -> dict[Contender, list]:
    """Return {contender: [(round, ms)]}, one run of each contender a round.

    A contender leaves the rounds after its planned number of runs.
    """
    times, planned = {}, {}
    for contender, ready in warm.items():
        # Round -1: this run was not interleaved with runs of the others.
        times[contender] = [(-1, 1e3 * ready.seconds)] if ready.is_timed else []
        planned[contender] = _plan_runs(contender, ready, level)

    pool = "xla"
    for index in range(max(planned.values(), default=0)):
        for contender, ready in warm.items():
            if index < planned[contender]:
                _switch_pool(pool, ready.prepared)
                pool = ready.prepared.pool
                start = time.perf_counter()
                ready.prepared.run()
                times[contender].append((index, 1e3 * _seconds_since(start)))
    return times


def _plan_runs(contender: Contender, ready: _Warm, level: Level) -> int:
    """Return the number of runs that fit the level's time, within all bounds."""
    if ready.is_timed:
        return 0
    most = min(contender.most_runs or level.most_runs, level.most_runs)
    affordable = int(level.seconds / max(ready.seconds, 1e-9))
    return max(contender.least_runs, min(affordable, most))


def _switch_pool(pool: str, prepared: Prepared) -> None:
    """Run a contender once, not timed, if the run before it used another library.

    Its threads then sleep and the caches hold other data, which made the first run of
    each contender 1.5 times slower.
    """
    if prepared.pool == pool:
        return
    if pool != "xla":
        time.sleep(_SPIN_SECONDS)
    prepared.run()


def _seconds_since(start: float) -> float:
    return time.perf_counter() - start
