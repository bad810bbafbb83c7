"""The plot of achieved rates against the limits of the device."""

from benchmarks.plots.style import (
    OUR_COLORS,
    PEER_COLORS,
    PEER_MARKERS,
    SWEEP,
    format_value,
    make_panels,
)
from benchmarks.report.statistics import find_time

_COLORS = (*OUR_COLORS, *PEER_COLORS)
_MARKERS = "o" + PEER_MARKERS
_LIMIT_STYLES = ("-", "--", "-.", ":")


def draw_roofline(records, title):
    """Return the figure of rates against intensity, with the limits, or None."""
    points = [record for record in records if _has_rate(record)]
    if not points:
        return None
    figure, (axes,) = make_panels(1, title, points, width=9.5, height=5.5)

    _draw_limits(axes, points)
    operations = {}
    for record in points:
        operations.setdefault(record["operation"], []).append(record)
    for index, members in enumerate(operations.values()):
        _draw_operation(axes, members, index)

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flops / bytes, both as little as the operation needs")
    axes.set_ylabel("achieved flops / s")
    axes.plot([], [], "o", color="black", markerfacecolor="none", label="hollow: peers")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _has_rate(record):
    """Whether flops, bytes and limits of a record are known; sweeps are left out."""
    is_known = record["flops"] and record["bytes"] and record["limits"]
    return is_known and not SWEEP.search(record["implementation"])


def _draw_operation(axes, records, index):
    """Draw the records of one operation: peers hollow, jlora filled."""
    color = _COLORS[index % len(_COLORS)]
    for role, face in (("peer", "none"), ("jlora", color)):
        shown = [record for record in records if record["role"] == role]
        intensities = [_compute_intensity(record) for record in shown]
        rates = [_compute_rate(record) for record in shown]

        axes.plot(
            intensities,
            rates,
            linestyle="",
            marker=_MARKERS[index % len(_MARKERS)],
            color=color,
            markerfacecolor=face,
            markersize=6,
            alpha=0.8,
            label=records[0]["operation"] if role == "jlora" else None,
        )


def _draw_limits(axes, records):
    """Draw the limit of each dtype: the slope of the copy, then the flat product."""
    limits = _list_limits(records)
    intensities = [_compute_intensity(record) for record in records]
    knees = [flops / rate for _, flops, rate in limits]
    least, most = min(*intensities, *knees) / 3, max(*intensities, *knees) * 3

    for index, (dtype, flops, rate) in enumerate(limits):
        rates = f"{format_value(flops)}flop/s, {format_value(rate)}B/s"
        axes.plot(
            [least, flops / rate, most],
            [least * rate, flops, flops],
            _LIMIT_STYLES[index % len(_LIMIT_STYLES)],
            color="#444444",
            linewidth=1.2,
            label=f"limit, {dtype}: {rates}",
        )


def _compute_intensity(record):
    return record["flops"] / record["bytes"]


def _compute_rate(record):
    """Return the achieved flops per second."""
    return 1e3 * record["flops"] / find_time(record).median


def _list_limits(records):
    """Return the sorted (dtype, flops/s, bytes/s) of the newest run of each dtype."""
    newest = {}
    for record in records:
        dtype = record["case"]["dtype"]
        newest[dtype] = max(newest.get(dtype, ""), record["time"])

    limits = set()
    for record in records:
        dtype, limit = record["case"]["dtype"], record["limits"]
        if record["time"] == newest[dtype]:
            limits.add((dtype, limit["flops_per_s"], limit["bytes_per_s"]))
    return sorted(limits)
