"""The plot of time against excess error of the truncated SVD."""

import math
from typing import NamedTuple

from benchmarks.plots.style import (
    BLUE,
    MAX_PANELS,
    SWEEP,
    assign_styles,
    count_in_title,
    make_panels,
    name_method,
    plot_times,
    scale_times,
)
from benchmarks.report.statistics import choose_cases, find_error, find_time

# float32 does not resolve smaller excess errors: they are drawn at this value.
LEAST_ERROR = 1e-9
# Exact peers stand side by side in a shaded band, at these fractions of LEAST_ERROR.
_BAND = (0.4, 0.2, 0.1)
# Distances of a number from its point and from its neighbours, in pixels.
_OFFSET, _MIN_DISTANCE = (12, 11), 14


class _Label(NamedTuple):
    """The number of passes of one point."""

    error: float
    time: float
    num_passes: str


def draw_frontier(records, title):
    """Return the figure of time against excess error of the truncated SVD, or None."""
    records = [record for record in records if _is_svd_with_error(record)]
    cases = choose_cases(records, MAX_PANELS)
    if not cases:
        return None

    num_cases = len({record["case"]["name"] for record in records})
    title = count_in_title(title, len(cases), num_cases, "cases")
    figure, panels = make_panels(len(cases), title, records)

    # Draw each case, with a scale that all panels share.
    styles = assign_styles(records)
    largest = max(find_error(record)[1] for record in records)
    labels = []
    for axes, case in zip(panels, cases, strict=True):
        of_case = [each for each in records if each["case"]["name"] == case["name"]]
        labels.append(_draw_case(axes, of_case, styles))
        axes.set_title(case["name"], fontsize=9)
    for axes in panels:
        _scale_errors(axes, largest)
    _add_legend(figure, records, styles)

    # The numbers need the final positions of all points.
    figure.draw_without_rendering()
    for axes, of_case in zip(panels, labels, strict=True):
        _write_labels(axes, of_case)
    return figure


def _is_svd_with_error(record):
    error = find_error(record)[1]
    is_svd = record["operation"] == "truncated svd"
    return is_svd and error is not None and math.isfinite(error)


def _draw_case(axes, records, styles):
    """Draw a line through each of jlora's methods and a marker for each peer.

    Returns the `_Label`s of the numbers of passes, which are written later.
    """
    methods = {}
    for record in records:
        methods.setdefault(name_method(record), []).append(record)

    labels = []
    for name, members in methods.items():
        # Sorted by error, then time, so that noisy times make no hooks in the line.
        members.sort(
            key=lambda record: (-_clip_error(record), find_time(record).median)
        )
        errors = [_clip_error(record) for record in members]
        role = members[0]["role"]
        if role == "peer" and errors == [LEAST_ERROR]:
            errors = [LEAST_ERROR * _BAND[list(styles).index(name) % len(_BAND)]]

        plot_times(axes, errors, members, styles[name])
        if role == "jlora":
            labels += _mark_settings(axes, errors, members, styles[name]["color"])
    return labels


def _clip_error(record):
    return max(find_error(record)[1], LEAST_ERROR)


def _mark_settings(axes, errors, records, color):
    """Draw a star at a method's defaults, and return the `_Label`s of its sweep."""
    labels = []
    for error, record in zip(errors, records, strict=True):
        time = find_time(record).median
        if sweep := SWEEP.search(record["implementation"]):
            labels.append(_Label(error, time, sweep[1]))
        else:
            _draw_star(axes, error, time, color)
    return labels


def _draw_star(axes, error, time, color):
    axes.plot(
        error,
        time,
        "*",
        color=color,
        markersize=13,
        markeredgecolor="white",
        zorder=4,
    )


def _write_labels(axes, labels):
    """Write the number of passes at each point that has room for it."""
    markers = _list_markers(axes)
    written = []
    for error, time, num_passes in labels:
        x, y = axes.transData.transform((error, time))
        position = (x + _OFFSET[0], y + _OFFSET[1])
        others = [point for point in markers if math.dist(point, (x, y)) > 1]
        distances = [math.dist(position, each) for each in others + written]

        if all(distance > _MIN_DISTANCE for distance in distances):
            written.append(position)
            text = axes.annotate(
                num_passes,
                (error, time),
                (4, 3),
                textcoords="offset points",
                fontsize=7,
                color=BLUE,
            )
            text.set_in_layout(False)


def _list_markers(axes):
    """Return the pixel coordinates (x, y) of all markers."""
    points = []
    for line in axes.lines:
        if line.get_marker() not in ("None", ""):
            points += map(tuple, axes.transData.transform(line.get_xydata()))
    return points


def _scale_errors(axes, largest):
    """Give the axes a logarithmic horizontal axis of errors, up to the largest one."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xlim(0.05 * LEAST_ERROR, max(3e-7, 3 * largest))
    axes.axvspan(0.05 * LEAST_ERROR, LEAST_ERROR, color="#EEEEEE", zorder=0)

    most = max(-6, math.ceil(math.log10(max(largest, LEAST_ERROR))))
    powers = range(-9, most + 1, 2)
    axes.set_xticks([10.0**power for power in powers])
    axes.set_xticklabels([f"{'≤' if power == -9 else ''}1e{power}" for power in powers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("excess error")
    scale_times(axes)


def _add_legend(figure, records, styles):
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
