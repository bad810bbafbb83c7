"""How much a shared machine changed between two runs, told by peers and limits."""

import math
import statistics
from typing import NamedTuple

from benchmarks.report.statistics import (
    MAX_OTHERS_CORES,
    count_others_cores,
    find_time,
)

MIN_PROXIES = 3  # records that a drift is taken from, where possible


class Drift(NamedTuple):
    """The change of the times of peers and limits, whose code is the same in both."""

    factor: float = 1.0  # median of after / before
    noise: float = 0.0  # a relative change of one of them up to this is common
    count: int = 0


def find_drift(pairs):
    """Return the `Drift` of pairs (before, after) of records of unchanged code.

    Its noise is two standard deviations of the logarithms of the ratios.
    """
    pairs = _choose_proxies(pairs)
    if not pairs:
        return Drift()

    logs = []
    for before, after in pairs:
        logs.append(math.log(find_time(after).median / find_time(before).median))
    middle = statistics.median(logs)
    # The median distance, not the mean: one peer whose threads were starved says
    # nothing about the others. 1.4826 makes it the std of normal noise.
    deviation = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    return Drift(math.exp(middle), math.expm1(2 * deviation), len(pairs))


def _choose_proxies(pairs):
    """Return the pairs that tell best how the machine treats programs like jlora's.

    Measured beside one other busy process, a program compiled by JAX took up to twice
    its time, and torch, NumPy and SciPy up to 100 times theirs.
    """
    compiled = [pair for pair in pairs if pair[1]["compile_ms"] is not None]
    quiet = [pair for pair in pairs if count_others_cores(pair) <= MAX_OTHERS_CORES]
    both = [pair for pair in compiled if pair in quiet]

    for chosen in (both, quiet, compiled):
        if len(chosen) >= MIN_PROXIES:
            return chosen
    return pairs


def find_disturbance(record):
    """Return the fraction of its time by which other processes can slow a record.

    A program waits for its slowest thread: one core shared with one process doubles
    the time, and more processes do no worse until each core is shared.
    """
    others = count_others_cores([record])
    return min(others, max(1.0, others / record["host"]["threads"]))
