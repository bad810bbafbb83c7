"""Plots of records, written as PNG: the roofline, memory, and those of frontier.py, growth.py."""

from benchmarks.plots.pareto import draw_frontier
from benchmarks.plots.scaling import draw_times
from benchmarks.plots.style import (
    BLUE,
    MAX_PANELS,
    ORANGE,
    OUR_COLOURS,
    PEER_COLOURS,
    PEER_MARKERS,
    SWEEP,
    count_panels,
    format_value,
    make_panels,
)
from benchmarks.report.statistics import find_time, is_measured, name_problem


def draw_plots(records, folder):
    """Write every plot that the records hold points for, and return {title: path}."""
    paths = {}
    for name, (title, draw) in _PLOTS.items():
        figure = draw([record for record in records if is_measured(record)], title)
        if figure is not None:
            paths[title] = folder / f"{name}.png"
            figure.savefig(paths[title], dpi=110, bbox_inches="tight")
    return paths


def draw_roofline(records, title):
    """Return the figure of achieved rate against intensity, with the measured limits, or None."""
    points = [
        record
        for record in records
        if record["flops"]
        and record["bytes"]
        and record["limits"]
        and not SWEEP.search(record["implementation"])
    ]
    if not points:
        return None
    figure, (axes,) = make_panels(1, title, points, width=9.5, height=5.5)
    _draw_limits(axes, points)
    operations = list(dict.fromkeys(record["operation"] for record in points))
    for index, operation in enumerate(operations):
        members = [record for record in points if record["operation"] == operation]
        colour = (*OUR_COLOURS, *PEER_COLOURS)[index % 8]
        marker = "o" + PEER_MARKERS
        for role, face in (("peer", "none"), ("jlora", colour)):
            shown = [record for record in members if record["role"] == role]
            axes.plot(
                [record["flops"] / record["bytes"] for record in shown],
                [1e3 * record["flops"] / find_time(record).median for record in shown],
                linestyle="",
                marker=marker[index % len(marker)],
                color=colour,
                markerfacecolor=face,
                markersize=6,
                alpha=0.8,
                label=operation if role == "jlora" else None,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops / bytes, both as little as the operation needs")
    axes.set_ylabel("achieved flops / s")
    axes.plot([], [], "o", color="black", markerfacecolor="none", label="hollow: peers")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _draw_limits(axes, points):
    intensities = [record["flops"] / record["bytes"] for record in points]
    limits = _list_limits(points)
    knees = [flops / rate for _, flops, rate in limits]
    least, most = min(*intensities, *knees) / 3, max(*intensities, *knees) * 3
    for (dtype, flops, rate), style in zip(
        limits, ("-", "--", "-.", ":") * 9, strict=False
    ):
        axes.plot(
            [least, flops / rate, most],
            [least * rate, flops, flops],
            style,
            color="#444444",
            linewidth=1.2,
            label=f"limit, {dtype}: {format_value(flops)}flop/s, {format_value(rate)}B/s",
        )


def _list_limits(records):
    """Return (dtype, flops/s, bytes/s) of the newest run of each dtype."""
    newest = {}
    for record in records:
        dtype = record["case"]["dtype"]
        newest[dtype] = max(newest.get(dtype, ""), record["time"])
    return sorted(
        {
            (
                record["case"]["dtype"],
                record["limits"]["flops_per_s"],
                record["limits"]["bytes_per_s"],
            )
            for record in records
            if record["time"] == newest[record["case"]["dtype"]]
        }
    )


def draw_memory(records, title):
    """Return the figure of the peak memory of compiled programs, a panel an operation, or None."""
    records = [
        record
        for record in records
        if record["peak_bytes"] and record["role"] != "limit"
    ]
    problems = {}
    for record in records:
        problems.setdefault(name_problem(record), []).append(record)
    shown = _choose_problems(problems)
    if not shown:
        return None
    most_bars = max(len(problems[problem]) for problem in shown)
    figure, panels = make_panels(
        len(shown),
        count_panels(title, len(shown), len(problems), "problems"),
        records,
        width=5.4,
        height=1.3 + 0.22 * most_bars,
    )
    for axes, problem in zip(panels, shown, strict=True):
        _draw_bars(axes, problems[problem])
        axes.set_title(f"{problem[1]}\n{problem[2]}", fontsize=9)
    return figure


def _choose_problems(problems):
    """Return one problem an operation, the one that most programs or most memory were seen of."""
    best = {}
    for problem, records in problems.items():
        size = len(records), max(record["peak_bytes"] for record in records)
        if problem[:2] not in best or size > best[problem[:2]][0]:
            best[problem[:2]] = size, problem
    # Where one program is alone there is nothing to compare.
    ranked = sorted(best.values(), key=lambda each: each[0] == 1)
    return [problem for _, problem in ranked[:MAX_PANELS]]


def _draw_bars(axes, records):
    sizes = [record["peak_bytes"] / 2**20 for record in records]
    colours = [BLUE if record["role"] == "jlora" else ORANGE for record in records]
    bars = axes.barh(range(len(records)), sizes, color=colours)
    axes.bar_label(bars, [format_value(size) for size in sizes], padding=3, fontsize=8)
    axes.set_yticks(
        range(len(records)), [record["implementation"] for record in records]
    )
    axes.tick_params(labelsize=8)
    axes.set_ylim(
        max(len(records), 6) - 0.4, -0.6
    )  # downwards, and few bars not too thick
    axes.set_xlim(0, 1.2 * max(sizes))
    axes.set_xlabel("MiB: arguments, results, temporaries", fontsize=8)


def _times_against(varied):
    return f"Time against {varied}", lambda records, title: draw_times(
        records, title, varied
    )


_PLOTS = {
    "frontier": ("Truncated SVD: time against excess error", draw_frontier),
    "time-against-size": _times_against("size"),
    "time-against-rank": _times_against("rank"),
    "time-against-batch": _times_against("batch"),
    "time-against-tokens": _times_against("tokens"),
    "roofline": ("Roofline: rates against the measured limits", draw_roofline),
    "memory": ("Peak memory of compiled JAX programs", draw_memory),
}
