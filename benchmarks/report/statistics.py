"""Medians, quartiles and ratios of records, and the peers to compare jlora with."""

from typing import NamedTuple

import numpy as np

# A peer counts as exact as jlora up to this: smaller differences are rounding and luck
# of the random draw.
SAME_ERROR, SAME_ERROR_ABOVE = 1.05, 1e-6
# One burst of other work can move the median of fewer ratios to any value.
MIN_SHARED_ROUNDS = 3
# If other processes keep more cores busy than this, they disturb a measurement.
MAX_OTHERS_CORES = 0.5


class Spread(NamedTuple):
    """The median and the quartiles of some values."""

    median: float
    lower: float  # quartile
    upper: float
    count: int


class Ratio(NamedTuple):
    """One time as a multiple of another."""

    ratio: float
    lower: float  # quartile
    upper: float
    count: int  # of the ratios or times behind it


def find_spread(values):
    """Return the `Spread` of some numbers."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return Spread(median, lower, upper, len(values))


def find_time(record):
    """Return the `Spread` of a measured record's times, in ms."""
    return find_spread(record["times_ms"])


def ratio_of_medians(record, other):
    """Return the `Ratio` of the times of two measured records.

    If both took part in three or more common rounds, the ratio is taken in each round:
    a burst of other work on the machine then slows both sides. Otherwise the medians
    are divided, and the quartiles of the ratio are the widest that the quartiles of
    both sides allow.
    """
    ratios = _divide_rounds(record, other) if is_same_run(record, other) else []
    if len(ratios) >= MIN_SHARED_ROUNDS:
        return Ratio(*find_spread(ratios))

    ours, theirs = find_time(record), find_time(other)
    return Ratio(
        ours.median / theirs.median,
        ours.lower / theirs.upper,
        ours.upper / theirs.lower,
        min(ours.count, theirs.count),
    )


def _divide_rounds(record, other):
    ours, theirs = (
        dict(zip(each["rounds"], each["times_ms"], strict=True))
        for each in (record, other)
    )
    shared = sorted(ours.keys() & theirs.keys())
    return [ours[number] / theirs[number] for number in shared]


def is_same_run(record, other):
    """Whether two records were timed in interleaved rounds, on one problem."""
    has_same_time = record["time"] == other["time"]
    return has_same_time and name_problem(record) == name_problem(other)


def name_problem(record):
    """Return (suite, operation, case name), which all contenders of a group share."""
    return record["suite"], record["operation"], record["case"]["name"]


def is_measured(record):
    """Whether a record holds times."""
    return record["status"] == "measured"


def find_error(record):
    """Return (kind, value) of the error to judge by, (None, None) if there is none."""
    return next(iter(record["errors"].items()), (None, None))


def is_as_exact(other, record):
    """Whether another record's error is no larger than this one's, up to luck.

    If an operation has no error, every implementation is as exact as every other.
    """
    kind, error = find_error(record)
    if kind is None:
        return True

    value = other["errors"].get(kind)
    return value is not None and value <= SAME_ERROR * error + SAME_ERROR_ABOVE


def find_fastest_peer(record, records, *, as_exact):
    """Return the fastest measured peer on the problem of a record, or None.

    Args:
        as_exact: Consider only peers that are at least as exact as the record.
    """
    peers = [
        other
        for other in records
        if other["role"] == "peer"
        and is_measured(other)
        and name_problem(other) == name_problem(record)
        and (not as_exact or is_as_exact(other, record))
    ]
    return min(peers, key=lambda peer: find_time(peer).median, default=None)


def is_disturbed(records):
    """Whether other processes kept a core busy while some records were measured."""
    return count_others_cores(records) > MAX_OTHERS_CORES


def count_others_cores(records):
    """Return the most cores that other processes kept busy during some records."""
    return max(record["others_cores"] or 0.0 for record in records)


def choose_cases(records, most):
    """Return at most `most` cases that together show the most different field values.

    Greedy: the next case is always the one with the most values not yet shown.
    """
    remaining = {record["case"]["name"]: record["case"] for record in records}
    order = list(remaining)

    chosen, seen = [], set()
    while remaining and len(chosen) < most:
        name = max(
            remaining, key=lambda name: len(_list_features(remaining[name]) - seen)
        )
        chosen.append(remaining.pop(name))
        seen |= _list_features(chosen[-1])
    return sorted(chosen, key=lambda case: order.index(case["name"]))


def _list_features(case):
    fields = ("rank", "spectrum", "dtype", "layers", "tokens")
    features = {(field, case[field]) for field in fields}
    return features | {("shape", case["m"], case["n"])}


def describe_machine(records):
    """Return the device, its host and the thread count of some records, in words."""
    names = []
    for record in records:
        device, host = record["device"], record["host"]
        count = f"{device['count']} × " if device["count"] > 1 else ""
        kind = f"{count}{device['kind']}"
        names.append(f"{kind}, {host['processor']}, {host['threads']} threads")
    return "; ".join(dict.fromkeys(names))


def describe_commits(records):
    """Return the commits of some records, in words, oldest run first."""
    names = []
    for record in sorted(records, key=lambda record: record["time"]):
        mark = " + dirty" if record["dirty"] else ""
        names.append(record["commit"][:8] + mark)
    return ", ".join(dict.fromkeys(names))


def describe_dates(records):
    """Return the first and last day of some records."""
    days = [record["time"][:10] for record in records]
    first, last = min(days), max(days)
    return first if first == last else f"{first} to {last}"
