"""All targets in order, and one line of text for each."""

from benchmarks.report.statistics import is_measured
from benchmarks.report.targets import (
    adaptation,
    checkpoints,
    factorization,
    package,
    quantization,
    reconstruction,
    training,
    updates,
)
from benchmarks.report.targets.target import Worst
from benchmarks.run.records import record_key


def evaluate_targets(records):
    """Return one line for each target: `name: value (bound) met`, or `... missed`.

    A target without records has a line too, and counts as missed.
    """
    found = {record_key(record): record for record in records if is_measured(record)}
    return [format_target(each, each.measure(found)) for each in list_targets()]


def list_targets():
    """Return the `Target`s of all parts, in order."""
    suites = (
        package,
        factorization,
        updates,
        reconstruction,
        adaptation,
        checkpoints,
        training,
        quantization,
    )
    return [target for suite in suites for target in suite.TARGETS]


def format_target(target, value):
    """Return the line of a target for a value, a `Worst` or None."""
    worst = value if isinstance(value, Worst) else Worst(value, 0, 1)
    value = worst.value

    relation = "at least" if target.at_least else "at most"
    name = f"part {target.part}, {target.name}"
    limit = f"({relation} {target.bound:g})"
    if value is None:
        return f"{name}: no record {limit} missed"

    is_met = value >= target.bound if target.at_least else value <= target.bound
    missing = ""
    if worst.num_missing:
        missing = f"; {worst.num_missing} of {worst.num_cases} cases have no record"
    verdict = "met" if is_met and not missing else "missed"
    return f"{name}: {value:.3g} {limit} {verdict}{missing}"
