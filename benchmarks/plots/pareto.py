"""The plot of time against excess error of the truncated SVD."""

import math

from benchmarks.plots.style import (
    BLUE,
    MAX_PANELS,
    SWEEP,
    assign_styles,
    count_panels,
    make_panels,
    name_method,
    plot_times,
    scale_times,
)
from benchmarks.report.statistics import choose_cases, find_error, find_time

LEAST_ERROR = 1e-9  # float32 cannot tell smaller excess errors apart; drawn here
_BAND = (0.4, 0.2, 0.1)  # of it: exact peers stand side by side in a shaded band


def draw_frontier(records, title):
    """Return the figure of time against excess error of the truncated SVD, or None."""
    records = [
        record
        for record in records
        if record["operation"] == "truncated svd" and _is_finite(find_error(record)[1])
    ]
    cases = choose_cases(records, MAX_PANELS)
    if not cases:
        return None
    num_cases = len({record["case"]["name"] for record in records})
    title = count_panels(title, len(cases), num_cases, "cases")
    figure, panels = make_panels(len(cases), title, records)
    styles = assign_styles(records)
    for axes, case in zip(panels, cases, strict=True):
        of_case = [
            record for record in records if record["case"]["name"] == case["name"]
        ]
        _draw_frontier_case(axes, of_case, styles)
        axes.set_title(case["name"], fontsize=9)
    largest = max(find_error(record)[1] for record in records)
    for axes in panels:
        _scale_errors(axes, largest)
    _add_frontier_legend(figure, records, styles)
    _annotate_passes(figure, panels)
    return figure


def _draw_frontier_case(axes, records, styles):
    """Join the settings of each of jlora's methods, and mark each peer."""
    methods = {}
    for record in records:
        methods.setdefault(name_method(record), []).append(record)
    for name, members in methods.items():
        # By error, then time: noise in the time then makes no hooks in the line.
        members.sort(
            key=lambda record: (-_clip_error(record), find_time(record).median)
        )
        errors = [_clip_error(record) for record in members]
        if members[0]["role"] == "peer" and errors == [LEAST_ERROR]:
            errors = [LEAST_ERROR * _BAND[list(styles).index(name) % len(_BAND)]]
        plot_times(axes, errors, members, styles[name])
        if members[0]["role"] == "jlora":
            for error, record in zip(errors, members, strict=True):
                _mark_setting(axes, error, record, styles[name])


def _clip_error(record):
    return max(find_error(record)[1], LEAST_ERROR)


def _mark_setting(axes, error, record, style):
    """Star a method's defaults; leave the number of passes to be written once all is laid out."""
    time = find_time(record).median
    if sweep := SWEEP.search(record["implementation"]):
        axes.passes = [*getattr(axes, "passes", []), (error, time, sweep[1])]
    else:
        axes.plot(
            error,
            time,
            "*",
            color=style["color"],
            markersize=13,
            markeredgecolor="white",
            zorder=4,
        )


def _annotate_passes(figure, panels):
    """Write the number of passes at the points that have room for it."""
    figure.draw_without_rendering()
    for axes in panels:
        passes = getattr(axes, "passes", [])
        markers = [
            tuple(point)
            for line in axes.lines
            if line.get_marker() not in ("None", "")
            for point in axes.transData.transform(line.get_xydata())
        ]
        written = []
        for error, time, number in passes:
            x, y = axes.transData.transform((error, time))
            spot = (x + 12, y + 11)
            others = [point for point in markers if math.dist(point, (x, y)) > 1]
            if all(math.dist(spot, point) > 14 for point in [*others, *written]):
                written.append(spot)
                text = axes.annotate(
                    number,
                    (error, time),
                    (4, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=BLUE,
                )
                text.set_in_layout(False)


def _scale_errors(axes, largest):
    from matplotlib.ticker import NullLocator

    powers = range(-9, max(-6, math.ceil(math.log10(max(largest, LEAST_ERROR)))) + 1, 2)
    axes.set_xscale("log")
    axes.set_xlim(0.05 * LEAST_ERROR, max(3e-7, 3 * largest))
    axes.axvspan(0.05 * LEAST_ERROR, LEAST_ERROR, color="#EEEEEE", zorder=0)
    axes.set_xticks([10.0**power for power in powers])
    axes.set_xticklabels(
        [f"≤1e{power}" if power == -9 else f"1e{power}" for power in powers]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("excess error")
    scale_times(axes)


def _add_frontier_legend(figure, records, styles):
    from matplotlib.lines import Line2D

    names = dict.fromkeys(name_method(record) for record in records)
    handles = [Line2D([], [], label=name, **styles[name]) for name in names]
    star = Line2D(
        [],
        [],
        linestyle="",
        marker="*",
        color="#444444",
        markersize=11,
        label="star: a method's defaults",
    )
    number = Line2D(
        [], [], linestyle="", marker="$8$", color=BLUE, label="number: passes"
    )
    figure.legend(
        handles=[*handles, star, number],
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )


def _is_finite(value):
    return value is not None and math.isfinite(value)
