"""What all plots share: panels under a title, styles, axes of time; matplotlib is optional."""

import importlib.util
import re

from benchmarks.report.statistics import describe_commits, describe_machine, find_time

MAX_PANELS = 6
# Okabe and Ito's colours, told apart by colour-blind readers; peers also differ by marker.
BLUE, _RED, _GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
OUR_COLOURS = (BLUE, _RED, _GREEN, "#000000")
PEER_COLOURS = (ORANGE, "#CC79A7", "#56B4E9", "#666666")
PEER_MARKERS = "s^vDPX<>ph*d"
SWEEP = re.compile(r" (\d+) passes$")


def can_draw():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def name_method(record):
    """Return the implementation without its number of passes."""
    return SWEEP.sub("", record["implementation"])


def plot_times(axes, values, records, style, label=None):
    """Draw medians, with the quartiles as thin bars."""
    times = [find_time(record) for record in records]
    medians = [time.median for time in times]
    below = [time.median - time.lower for time in times]
    above = [time.upper - time.median for time in times]
    axes.errorbar(
        values, medians, (below, above), elinewidth=0.8, alpha=0.9, label=label, **style
    )


def assign_styles(records):
    """Return {implementation without its passes: style}, jlora joined and solid, peers marked."""
    styles, ours, peers = {}, 0, 0
    for record in records:
        name = name_method(record)
        if name in styles:
            continue
        if record["role"] == "jlora":
            styles[name] = {
                "color": OUR_COLOURS[ours % len(OUR_COLOURS)],
                "marker": "o",
                "markersize": 4,
                "linestyle": "-",
            }
            ours += 1
        else:
            styles[name] = {
                "color": PEER_COLOURS[peers % len(PEER_COLOURS)],
                "marker": PEER_MARKERS[peers % len(PEER_MARKERS)],
                "markersize": 6,
                "linestyle": "",
            }
            peers += 1
    return styles


def make_panels(count, title, records, width=4.6, height=3.9):
    """Return a figure of `count` axes under a title that names the device and the commit."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    columns = min(count, 3)
    rows = -(-count // columns)
    size = max(width * columns, 9.5), height * rows + 1.4
    figure = Figure(figsize=size, layout="constrained")
    commits = describe_commits(records)
    if len(commits) > 60:
        commits = "several commits"
    figure.suptitle(
        f"{title}\n{describe_machine(records)}, commit {commits}", fontsize=11
    )
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels[:count]


def count_panels(title, shown, total, noun):
    if shown == total:
        return title
    return f"{title} ({shown} of {total} {noun}; all are in the tables)"


def scale_times(axes):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    least, most = axes.get_ylim()
    wide = most / least > 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("ms")


def format_value(value):
    """Return three digits and the thousand: 4.19 M."""
    for factor, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if sign == ' k' else factor):.3g}{sign}"
    return f"{value:.0f} " if value >= 1000 else f"{value:.3g} "
