"""Panels, colours, markers and axes that all plots share; matplotlib is optional."""

import importlib.util
import re

from benchmarks.report.statistics import describe_commits, describe_machine, find_time

MAX_PANELS = 6
# Okabe and Ito's colours, which colour-blind readers can tell apart. Peers also differ
# by marker.
BLUE, _RED, _GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
OUR_COLORS = (BLUE, _RED, _GREEN, "#000000")
PEER_COLORS = (ORANGE, "#CC79A7", "#56B4E9", "#666666")
PEER_MARKERS = "s^vDPX<>ph*d"
# The end of an implementation's name that belongs to a sweep over its passes.
SWEEP = re.compile(r" (\d+) passes$")
_LONGEST_COMMITS = 60  # characters of a list of commits that fit into a title


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def name_method(record: dict) -> str:
    """Return the implementation without its number of passes."""
    return SWEEP.sub("", record["implementation"])


def plot_times(axes, values, records, style, label=None):
    """Draw the median times, with thin bars from quartile to quartile.

    Args:
        values: The x coordinate of each record.
        style: Settings of a line, from `assign_styles`.
    """
    times = [find_time(record) for record in records]
    medians = [time.median for time in times]
    below = [time.median - time.lower for time in times]
    above = [time.upper - time.median for time in times]
    axes.errorbar(
        values, medians, (below, above), elinewidth=0.8, alpha=0.9, label=label, **style
    )


def assign_styles(records: list[dict]) -> dict[str, dict]:
    """Return {method: style}: jlora with solid lines, peers with markers only.

    A method is an implementation without its number of passes.
    """
    roles = {}
    for record in records:
        roles.setdefault(name_method(record), record["role"])

    styles, num_ours, num_peers = {}, 0, 0
    for name, role in roles.items():
        if role == "jlora":
            styles[name] = _make_our_style(num_ours)
            num_ours += 1
        else:
            styles[name] = _make_peer_style(num_peers)
            num_peers += 1
    return styles


def _make_our_style(index):
    color = OUR_COLORS[index % len(OUR_COLORS)]
    return {"color": color, "marker": "o", "markersize": 4, "linestyle": "-"}


def _make_peer_style(index):
    color = PEER_COLORS[index % len(PEER_COLORS)]
    marker = PEER_MARKERS[index % len(PEER_MARKERS)]
    return {"color": color, "marker": marker, "markersize": 6, "linestyle": ""}


def make_panels(num_panels, title, records, width=4.6, height=3.9):
    """Return (figure, axes of each panel) under a title with device and commit.

    Args:
        width: Width of one panel in inches.
        height: Height of one panel in inches.
    """
    from matplotlib.figure import Figure  # pyplot would open windows and keep state

    num_columns = min(num_panels, 3)
    num_rows = -(-num_panels // num_columns)
    size = max(width * num_columns, 9.5), height * num_rows + 1.4
    figure = Figure(figsize=size, layout="constrained")

    commits = describe_commits(records)
    if len(commits) > _LONGEST_COMMITS:
        commits = "several commits"
    origin = f"{describe_machine(records)}, commit {commits}"
    figure.suptitle(f"{title}\n{origin}", fontsize=11)

    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes in panels[num_panels:]:
        axes.remove()
    for axes in panels[:num_panels]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels[:num_panels]


def count_in_title(title: str, num_shown: int, total: int, noun: str) -> str:
    """Return the title, with the counts if not everything is shown."""
    if num_shown == total:
        return title
    return f"{title} ({num_shown} of {total} {noun}; all are in the tables)"


def scale_times(axes):
    """Give the axes a logarithmic vertical axis of times in ms."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylabel("ms")

    # Over more than two and a half decades, only powers of ten get a tick.
    least, most = axes.get_ylim()
    subs = (1,) if most / least > 300 else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def format_value(value: float) -> str:
    """Return a value with three digits and a unit prefix, such as "4.19 M"."""
    for factor, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if sign == ' k' else factor):.3g}{sign}"
    return f"{value:.0f} " if value >= 1000 else f"{value:.3g} "
