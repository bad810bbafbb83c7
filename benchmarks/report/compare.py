"""What changed between two runs, told apart from the noise of a shared machine."""

import math
import statistics
from typing import NamedTuple

from benchmarks.report.statistics import Spread, find_error, find_time, is_measured
from benchmarks.run.records import record_key

MIN_CHANGE = 0.25  # of the time; less is never called a change
# One or two runs have no quartiles to speak of. Twice as slow must still be seen.
FEW_RUNS, MIN_CHANGE_FEW = 3, 0.6
FEW_PROXIES = 3  # of the machine's mood
QUIET = 0.5  # cores that others keep busy
ERROR_GROWTH, ERROR_STEP = 2.0, 1e-5  # both must be exceeded


class Drift(NamedTuple):
    """How what should not have changed, the peers and the limits, changed between two runs."""

    factor: float = 1.0  # median of after / before
    noise: float = 0.0  # a change of one of them up to this is common
    count: int = 0


class Row(NamedTuple):
    """One key of the two files. Numbers are None where a side was not measured."""

    key: tuple  # suite, operation, case, implementation
    role: str
    verdict: (
        str  # unchanged | faster | slower | less exact | only in A | skipped in B | ...
    )
    before: Spread | None = None  # ms
    after: Spread | None = None
    ratio: float | None = None  # of the medians, after / before
    corrected: float | None = None  # the same, divided by the drift of the machine
    tolerance: float | None = None  # the change that is still noise
    errors: tuple = (None, None)  # of the first kind, before and after
    drift: Drift = Drift()
    reason: str | None = None  # why a side was not measured


def is_regression(row):
    """Whether a row says that jlora got slower, less exact, or stopped running."""
    return row.role == "jlora" and row.verdict in (
        "slower",
        "less exact",
        "failed in B",
    )


def compare_records(before, after):
    """Return (rows, regressions) of two lists of records, matched by key.

    Two processes on one machine differ by its mood. The median change of what is not jlora's, the
    peers and the limits, is taken for the machine's. A record is slower when its ratio of medians,
    corrected by that, exceeds 1 + its noise, and even its fastest run is slower than the upper
    quartile before. The noise is 0.25 or both spreads or, where that is more, the scatter of the
    changes of the others times what busy cores can cost.

    Raises:
        ValueError: the two were measured on different devices or numbers of threads.
    """
    _check_machines(before, after)
    before, after = _index_newest(before), _index_newest(after)
    unchanged = [
        (before[key], after[key])
        for key in before.keys() & after.keys()
        if before[key]["role"] != "jlora"
        and is_measured(before[key])
        and is_measured(after[key])
    ]
    drift = _find_drift(unchanged)
    rows = [
        _compare_pair(key, before.get(key), after.get(key), drift)
        for key in dict.fromkeys([*before, *after])
    ]
    return rows, [row for row in rows if is_regression(row)]


def _check_machines(before, after):
    kinds = [
        sorted(
            {
                (record["device"]["kind"], record["host"]["threads"])
                for record in records
            }
        )
        for records in (before, after)
    ]
    if before and after and kinds[0] != kinds[1]:
        raise ValueError(
            f"`before` and `after` must be of one device and number of threads, got {kinds[0]} "
            f"and {kinds[1]}. Measure both on one machine."
        )


def _index_newest(records):
    newest = {}
    for record in records:
        other = newest.get(record_key(record))
        if other is None or (is_measured(record), record["time"]) >= (
            is_measured(other),
            other["time"],
        ):
            newest[record_key(record)] = record
    return newest


def _find_drift(pairs):
    """Return the `Drift` of pairs of records; its noise is two standard deviations of the log."""
    pairs = _choose_proxies(pairs)
    if not pairs:
        return Drift()
    logs = [
        math.log(find_time(after).median / find_time(before).median)
        for before, after in pairs
    ]
    middle = statistics.median(logs)
    # From the median distance: one peer whose threads were starved tells nothing of the others.
    deviation = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    return Drift(math.exp(middle), math.expm1(2 * deviation), len(pairs))


def _choose_proxies(pairs):
    """Return the pairs that tell best how the machine treats programs like jlora's.

    Beside one other busy process a program compiled by JAX took up to twice its time, and torch,
    NumPy and SciPy up to 100 times theirs.
    """
    compiled = [pair for pair in pairs if pair[1]["compile_ms"] is not None]
    quiet = [pair for pair in pairs if max(map(_count_others, pair)) <= QUIET]
    both = [pair for pair in compiled if pair in quiet]
    return next(
        (each for each in (both, quiet, compiled) if len(each) >= FEW_PROXIES), pairs
    )


def _count_others(record):
    return record["others_cores"] or 0.0


def _compare_pair(key, before, after, drift):
    if before is None or after is None:
        one = before or after
        verdict = "only in A" if after is None else "only in B"
        return Row(key, one["role"], verdict, drift=drift, reason=one["reason"])
    if not (is_measured(before) and is_measured(after)):
        verdict, reason = _describe_missing(before, after)
        return Row(key, after["role"], verdict, drift=drift, reason=reason)
    times = find_time(before), find_time(after)
    ratio = times[1].median / times[0].median
    disturbance = max(_find_disturbance(before), _find_disturbance(after))
    row = Row(
        key,
        after["role"],
        "unchanged",
        *times,
        ratio,
        ratio / drift.factor,
        _find_tolerance(*times, (1 + drift.noise) * (1 + disturbance) - 1),
        _pair_errors(before, after),
        drift,
    )
    return row._replace(verdict=_judge(row, before["times_ms"], after["times_ms"]))


def _describe_missing(before, after):
    if is_measured(after):
        return f"{before['status']} in A", before["reason"]
    where = " in B" if is_measured(before) else ""
    return after["status"] + where, after["reason"]


def _find_tolerance(before, after, noise_between):
    spreads = [(each.upper - each.lower) / each.median for each in (before, after)]
    few = min(before.count, after.count) < FEW_RUNS
    return max(
        MIN_CHANGE_FEW if few else MIN_CHANGE, math.hypot(*spreads), noise_between
    )


def _find_disturbance(record):
    """Return by what part of its time other processes can have slowed a record.

    A program waits for its slowest thread: one core shared with one process doubles the time, and
    more processes do no worse until each core is shared.
    """
    others = _count_others(record)
    return min(others, max(1.0, others / record["host"]["threads"]))


def _pair_errors(before, after):
    kind, error = find_error(before)
    return error, after["errors"].get(kind)


def _judge(row, before_ms, after_ms):
    if _is_less_exact(*row.errors):
        return "less exact"
    drift = row.drift.factor
    if row.corrected > 1 + row.tolerance and min(after_ms) / drift > row.before.upper:
        return "slower"
    if row.corrected < 1 / (1 + row.tolerance) and row.after.upper / drift < min(
        before_ms
    ):
        return "faster"
    return "unchanged"


def _is_less_exact(before, after):
    if before is None or after is None or math.isnan(before):
        return False
    if math.isnan(after):
        return True
    return after > ERROR_GROWTH * before and after - before > ERROR_STEP


def format_comparison(rows):
    """Return the rows as a text table: a line for each record under its problem, then a count."""
    if not rows:
        return "no records"
    lines = [
        *_describe_noise(rows),
        "ratio: B/A of the medians, raw and corrected by the drift; noise: a change up to it",
    ]
    width = max(len(row.key[3]) for row in rows)
    problem = None
    for row in rows:
        if row.key[:3] != problem:
            problem = row.key[:3]
            lines += ["", ": ".join(problem)]
            lines.append(
                f"  {'':{width}} {'A ms':>20} {'B ms':>20} {'raw':>6} {'corr.':>6} {'noise':>6}"
                f" {'error A':>8} {'error B':>8}  verdict"
            )
        lines.append(_format_row(row, width))
    verdicts = [row.verdict for row in rows]
    counts = [
        f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)
    ]
    names = [
        f"  {': '.join(row.key)}: {row.verdict}" for row in rows if is_regression(row)
    ]
    regressions = (
        ["regressions of jlora:", *names] if names else ["no regression of jlora"]
    )
    return "\n".join([*lines, "", ", ".join(counts), *regressions])


def _describe_noise(rows):
    drift = rows[0].drift
    if not drift.count:
        return [
            "machine drift unknown: no peer or limit was measured in both; none is corrected"
        ]
    lines = [
        f"machine drift {drift.factor:.2f}, the median of {drift.count} peers and limits; "
        f"{drift.noise:.0%} between them is noise"
    ]
    tolerances = [
        row.tolerance for row in rows if row.role == "jlora" and row.tolerance
    ]
    if hidden := sum(tolerance >= 1 for tolerance in tolerances):
        lines.append(
            f"warning: too noisy to tell half the speed in {hidden} of {len(tolerances)} records "
            "of jlora; measure on an idle machine"
        )
    return lines


def _format_row(row, width):
    if row.before is None:
        reason = f": {row.reason}" if row.reason else ""
        return f"  {row.key[3]:{width}} {row.verdict}{reason}"
    errors = " ".join(
        f"{'–' if error is None else f'{error:.1e}':>8}" for error in row.errors
    )
    return (
        f"  {row.key[3]:{width}} {_format_times(row.before):>20} {_format_times(row.after):>20}"
        f" {row.ratio:6.2f} {row.corrected:6.2f} {row.tolerance:6.0%} {errors}  {row.verdict}"
    )


def _format_times(spread):
    return f"{spread.median:.4g} ({spread.lower:.3g}–{spread.upper:.3g})"
