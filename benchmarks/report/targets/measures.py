"""Measures: functions that read one figure from {key: record}.

A key is (suite, operation, case name, implementation), a problem its first three. A
measure returns None where a record is missing.
"""

from benchmarks.report.statistics import find_error, find_time, ratio_of_medians
from benchmarks.report.targets.target import Worst


def measure_time(key, factor=1.0):
    """Return the measure of the median time of a record, in ms times a factor."""

    def measure(found):
        record = found.get(key)
        return None if record is None else factor * find_time(record).median

    return measure


def measure_ratio(problem, ours, peer):
    """Return the measure of our time divided by a peer's, on one problem."""

    def measure(found):
        records = found.get((*problem, ours)), found.get((*problem, peer))
        return None if None in records else ratio_of_medians(*records).ratio

    return measure


def measure_error(key, kind=None):
    """Return the measure of an error of a record; None: the error to judge by."""

    def measure(found):
        record = found.get(key)
        if record is None:
            return None
        return find_error(record)[1] if kind is None else record["errors"].get(kind)

    return measure


def measure_worst(names, make_measure, pick=max):
    """Return the measure of the `Worst` value over cases.

    Args:
        make_measure: case name → its measure.
        pick: max, or min where the least value is the worst.
    """

    def measure(found):
        each = [make_measure(name)(found) for name in names]
        values = [value for value in each if value is not None]
        return Worst(pick(values, default=None), len(each) - len(values), len(each))

    return measure
