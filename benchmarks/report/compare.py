"""The changes between two runs, told apart from the noise of a shared machine."""

import math
from typing import NamedTuple

from benchmarks.report.drift import Drift, find_disturbance, find_drift
from benchmarks.report.statistics import Spread, find_error, find_time, is_measured
from benchmarks.run.records import record_key

MIN_CHANGE = 0.25  # of the time; a smaller change is always called noise
# One or two runs have no useful quartiles. A factor of two must still be seen.
FEW_RUNS, MIN_CHANGE_FEW = 3, 0.6
ERROR_GROWTH, ERROR_STEP = 2.0, 1e-5  # both must be exceeded


class Row(NamedTuple):
    """One key of the two files. Numbers are None where a side was not measured."""

    key: tuple  # suite, operation, case, implementation
    role: str
    # unchanged | faster | slower | less exact | only in A | skipped in B | ...
    verdict: str
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
    worse = ("slower", "less exact", "failed in B")
    return row.role == "jlora" and row.verdict in worse


def compare_records(before, after):
    """Return (rows, regressions) of two lists of records, matched by key.

    Two processes on one machine do not run equally fast. The code of peers and limits
    is the same in both runs, so the median change of their times is taken for the
    machine's drift. A record is slower when two conditions hold: its ratio of medians,
    corrected by the drift, exceeds 1 + its noise; and even its fastest run is slower
    than the upper quartile before. The noise is the largest of 0.25, the spread of the
    two sides, and the scatter between peers times the slowdown that busy cores can
    cause.

    Raises:
        ValueError: The two were measured on different devices or numbers of threads.
    """
    _check_machines(before, after)
    before, after = _index_newest(before), _index_newest(after)

    unchanged = []
    for key in before.keys() & after.keys():
        pair = before[key], after[key]
        if pair[0]["role"] != "jlora" and all(map(is_measured, pair)):
            unchanged.append(pair)
    drift = find_drift(unchanged)

    rows = [
        _compare_pair(key, before.get(key), after.get(key), drift)
        for key in dict.fromkeys([*before, *after])
    ]
    return rows, [row for row in rows if is_regression(row)]


def _check_machines(before, after):
    machines = _list_machines(before), _list_machines(after)
    if before and after and machines[0] != machines[1]:
        raise ValueError(
            "`before` and `after` must be of one device and number of threads, got "
            f"{machines[0]} and {machines[1]}. Measure both on one machine."
        )


def _list_machines(records):
    kinds = {(each["device"]["kind"], each["host"]["threads"]) for each in records}
    return sorted(kinds)


def _index_newest(records):
    """Return {key: record}, measured records before others, then newer before older."""
    newest = {}
    for record in records:
        key = record_key(record)
        if key not in newest or _get_order(record) >= _get_order(newest[key]):
            newest[key] = record
    return newest


def _get_order(record):
    return is_measured(record), record["time"]


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
    disturbance = max(find_disturbance(before), find_disturbance(after))
    noise_between = (1 + drift.noise) * (1 + disturbance) - 1

    row = Row(
        key,
        after["role"],
        "unchanged",
        *times,
        ratio=ratio,
        corrected=ratio / drift.factor,
        tolerance=_find_tolerance(*times, noise_between),
        errors=_pair_errors(before, after),
        drift=drift,
    )
    return row._replace(verdict=_judge(row, before["times_ms"], after["times_ms"]))


def _describe_missing(before, after):
    if is_measured(after):
        return f"{before['status']} in A", before["reason"]
    suffix = " in B" if is_measured(before) else ""
    return after["status"] + suffix, after["reason"]


def _find_tolerance(before, after, noise_between):
    """Return the relative change of the median that is still noise."""
    widths = [(each.upper - each.lower) / each.median for each in (before, after)]
    has_few = min(before.count, after.count) < FEW_RUNS
    least = MIN_CHANGE_FEW if has_few else MIN_CHANGE
    return max(least, math.hypot(*widths), noise_between)


def _pair_errors(before, after):
    kind, error = find_error(before)
    return error, after["errors"].get(kind)


def _judge(row, before_ms, after_ms):
    if _is_less_exact(*row.errors):
        return "less exact"

    drift, limit = row.drift.factor, 1 + row.tolerance
    if row.corrected > limit and min(after_ms) / drift > row.before.upper:
        return "slower"
    if row.corrected < 1 / limit and row.after.upper / drift < min(before_ms):
        return "faster"
    return "unchanged"


def _is_less_exact(before, after):
    if before is None or after is None or math.isnan(before):
        return False
    if math.isnan(after):
        return True
    return after > ERROR_GROWTH * before and after - before > ERROR_STEP


def format_comparison(rows):
    """Return the rows as text: one line for each record, under its problem; counts."""
    if not rows:
        return "no records"

    lines = [
        *_describe_noise(rows),
        "ratio: B/A of the medians, raw and corrected by the drift; noise: a change up "
        "to it",
    ]
    width = max(len(row.key[3]) for row in rows)
    problem = None
    for row in rows:
        if row.key[:3] != problem:
            problem = row.key[:3]
            lines += ["", ": ".join(problem), _format_header(width)]
        lines.append(_format_row(row, width))

    return "\n".join([*lines, "", *_summarize(rows)])


def _describe_noise(rows):
    drift = rows[0].drift
    if not drift.count:
        return [
            "machine drift unknown: no peer or limit was measured in both; no time is "
            "corrected"
        ]

    lines = [
        f"machine drift {drift.factor:.2f}, the median of {drift.count} peers and "
        f"limits; {drift.noise:.0%} between them is noise"
    ]
    ours = [row.tolerance for row in rows if row.role == "jlora" and row.tolerance]
    if hidden := sum(tolerance >= 1 for tolerance in ours):
        lines.append(
            f"warning: too noisy to tell half the speed in {hidden} of {len(ours)} "
            "records of jlora; measure on an idle machine"
        )
    return lines


def _format_header(width):
    return (
        f"  {'':{width}} {'A ms':>20} {'B ms':>20} {'raw':>6} {'corr.':>6} {'noise':>6}"
        f" {'error A':>8} {'error B':>8}  verdict"
    )


def _format_row(row, width):
    name = f"  {row.key[3]:{width}}"
    if row.before is None:
        reason = f": {row.reason}" if row.reason else ""
        return f"{name} {row.verdict}{reason}"

    texts = ["–" if error is None else f"{error:.1e}" for error in row.errors]
    errors = " ".join(f"{text:>8}" for text in texts)
    times = f"{_format_times(row.before):>20} {_format_times(row.after):>20}"
    change = f"{row.ratio:6.2f} {row.corrected:6.2f} {row.tolerance:6.0%}"
    return f"{name} {times} {change} {errors}  {row.verdict}"


def _format_times(spread):
    return f"{spread.median:.4g} ({spread.lower:.3g}–{spread.upper:.3g})"


def _summarize(rows):
    """Return the count of each verdict, and the regressions by name."""
    verdicts = [row.verdict for row in rows]
    counts = [f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)]

    regressions = [row for row in rows if is_regression(row)]
    if not regressions:
        return [", ".join(counts), "no regression of jlora"]
    names = [f"  {': '.join(row.key)}: {row.verdict}" for row in regressions]
    return [", ".join(counts), "regressions of jlora:", *names]
