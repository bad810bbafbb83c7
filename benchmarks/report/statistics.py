"""What records say: medians, quartiles and ratios, the peers to be held against, their origin."""

from typing import NamedTuple

import numpy as np

# A peer is as exact as jlora up to this: what lies between is rounding and luck of the draw.
SAME_ERROR, SAME_ERROR_ABOVE = 1.05, 1e-6
# The median of fewer ratios is one burst of other work away from any value.
MIN_SHARED_ROUNDS = 3


class Spread(NamedTuple):
    """The middle half of some values."""

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

    Three or more rounds that both took part in are compared one by one: a burst of other work on
    the machine then slows both sides. Otherwise the medians are divided, and the quartiles are as
    far apart as those of the two sides allow.
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
    times, others = (
        dict(zip(each["rounds"], each["times_ms"], strict=True))
        for each in (record, other)
    )
    return [
        times[number] / others[number]
        for number in sorted(times.keys() & others.keys())
    ]


def is_same_run(record, other):
    """Whether two records were timed in turns, on one problem."""
    return record["time"] == other["time"] and name_problem(record) == name_problem(
        other
    )


def name_problem(record):
    """Return what all contenders of a group share."""
    return record["suite"], record["operation"], record["case"]["name"]


def is_measured(record):
    return record["status"] == "measured"


def find_error(record):
    """Return (kind, value) of the error to judge by, (None, None) where none was measured."""
    return next(iter(record["errors"].items()), (None, None))


def is_as_exact(other, record):
    """Whether another record's error is no larger than this one's, up to luck.

    Where an operation has no error, everybody is as exact as everybody.
    """
    kind, error = find_error(record)
    if kind is None:
        return True
    value = other["errors"].get(kind)
    return value is not None and value <= SAME_ERROR * error + SAME_ERROR_ABOVE


def find_fastest_peer(record, records, *, as_exact):
    """Return the fastest measured peer on the problem of a record, or None.

    Args:
        as_exact: only among peers that are at least as exact as the record.
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


def choose_cases(records, most):
    """Return at most `most` cases, the ones that show the most different values of their fields."""
    left = {record["case"]["name"]: record["case"] for record in records}
    chosen, seen = [], set()
    while left and len(chosen) < most:
        name = max(left, key=lambda name: len(_list_features(left[name]) - seen))
        chosen.append(left.pop(name))
        seen |= _list_features(chosen[-1])
    order = list(dict.fromkeys(record["case"]["name"] for record in records))
    return sorted(chosen, key=lambda case: order.index(case["name"]))


def _list_features(case):
    fields = ("rank", "spectrum", "dtype", "layers", "tokens")
    return {
        ("shape", case["m"], case["n"]),
        *((field, case[field]) for field in fields),
    }


def describe_machine(records):
    """Return the device, its host and the thread count of some records, in words."""
    names = []
    for record in records:
        device, host = record["device"], record["host"]
        count = f"{device['count']} × " if device["count"] > 1 else ""
        kind = (
            f"{count}{device['kind']}, {host['processor']}, {host['threads']} threads"
        )
        names.append(kind)
    return "; ".join(dict.fromkeys(names))


def describe_commits(records):
    """Return the commits of some records, in words, oldest run first."""
    ordered = sorted(records, key=lambda record: record["time"])
    names = [
        record["commit"][:8] + (" + dirty" if record["dirty"] else "")
        for record in ordered
    ]
    return ", ".join(dict.fromkeys(names))


def describe_dates(records):
    """Return the first and last day of some records."""
    first, last = (
        pick(record["time"][:10] for record in records) for pick in (min, max)
    )
    return first if first == last else f"{first} to {last}"
