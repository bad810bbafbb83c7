"""The plot of the peak memory of compiled programs."""

from benchmarks.plots.style import (
    BLUE,
    MAX_PANELS,
    ORANGE,
    count_in_title,
    format_value,
    make_panels,
)
from benchmarks.report.statistics import name_problem


def draw_memory(records, title):
    """Return the figure of peak memory, one panel for each operation, or None."""
    records = [record for record in records if _has_memory(record)]
    if not records:
        return None

    problems = {}
    for record in records:
        problems.setdefault(name_problem(record), []).append(record)
    shown = _choose_problems(problems)
    most_bars = max(len(problems[problem]) for problem in shown)
    figure, panels = make_panels(
        len(shown),
        count_in_title(title, len(shown), len(problems), "problems"),
        records,
        width=5.4,
        height=1.3 + 0.22 * most_bars,
    )
    for axes, problem in zip(panels, shown, strict=True):
        _, operation, case_name = problem
        _draw_bars(axes, problems[problem])
        axes.set_title(f"{operation}\n{case_name}", fontsize=9)
    return figure


def _has_memory(record):
    return record["peak_bytes"] and record["role"] != "limit"


def _choose_problems(problems):
    """Return one problem for each operation: the one with most programs or memory."""
    best = {}
    for problem, records in problems.items():
        operation = problem[:2]
        size = len(records), max(record["peak_bytes"] for record in records)
        if operation not in best or size > best[operation][0]:
            best[operation] = size, problem

    # Problems with a single program come last: they compare nothing.
    ranked = sorted(best.values(), key=lambda each: each[0][0] == 1)
    return [problem for _, problem in ranked[:MAX_PANELS]]


def _draw_bars(axes, records):
    sizes = [record["peak_bytes"] / 2**20 for record in records]
    colors = [BLUE if record["role"] == "jlora" else ORANGE for record in records]
    bars = axes.barh(range(len(records)), sizes, color=colors)
    axes.bar_label(bars, [format_value(size) for size in sizes], padding=3, fontsize=8)

    names = [record["implementation"] for record in records]
    axes.set_yticks(range(len(records)), names)
    axes.tick_params(labelsize=8)
    # The first bar is at the top. Room for six bars keeps a few from becoming thick.
    axes.set_ylim(max(len(records), 6) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * max(sizes))
    axes.set_xlabel("MiB: arguments, results, temporaries", fontsize=8)
