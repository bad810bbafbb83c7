"""Plots of records, written as PNG; matplotlib is imported only when one is drawn."""

import importlib.util
import math
import re

from benchmarks.spread import (
    choose_cases,
    describe_commits,
    describe_machine,
    find_error,
    find_time,
    is_measured,
    name_problem,
)

MAX_PANELS = 6
LEAST_ERROR = 1e-9  # float32 cannot tell smaller excess errors apart; drawn here
_BAND = (0.4, 0.2, 0.1)  # of it: exact peers stand side by side in a shaded band
# Okabe and Ito's colours, told apart by colour-blind readers; peers also differ by marker.
_BLUE, _RED, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
_OUR_COLOURS = (_BLUE, _RED, _GREEN, "#000000")
_PEER_COLOURS = (_ORANGE, "#CC79A7", "#56B4E9", "#666666")
_PEER_MARKERS = "s^vDPX<>ph*d"
_SWEEP = re.compile(r" (\d+) passes$")


def can_draw():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(records, folder):
    """Write every plot that the records hold points for, and return {title: path}."""
    paths = {}
    for name, (title, draw) in _PLOTS.items():
        figure = draw([record for record in records if is_measured(record)], title)
        if figure is not None:
            paths[title] = folder / f"{name}.png"
            figure.savefig(paths[title], dpi=110, bbox_inches="tight")
    return paths


def draw_frontier(records, title):
    """Return the figure of time against excess error of the truncated SVD, or None."""
    records = [
        record for record in records
        if record["operation"] == "truncated svd" and _is_finite(find_error(record)[1])
    ]  # fmt: skip
    cases = choose_cases(records, MAX_PANELS)
    if not cases:
        return None
    num_cases = len({record["case"]["name"] for record in records})
    title = _count_panels(title, len(cases), num_cases, "cases")
    figure, panels = _make_panels(len(cases), title, records)
    styles = _assign_styles(records)
    for axes, case in zip(panels, cases, strict=True):
        of_case = [record for record in records if record["case"]["name"] == case["name"]]
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
        methods.setdefault(_name_method(record), []).append(record)
    for name, members in methods.items():
        # By error, then time: noise in the time then makes no hooks in the line.
        members.sort(key=lambda record: (-_clip_error(record), find_time(record).median))
        errors = [_clip_error(record) for record in members]
        if members[0]["role"] == "peer" and errors == [LEAST_ERROR]:
            errors = [LEAST_ERROR * _BAND[list(styles).index(name) % len(_BAND)]]
        _plot_times(axes, errors, members, styles[name])
        if members[0]["role"] == "jlora":
            for error, record in zip(errors, members, strict=True):
                _mark_setting(axes, error, record, styles[name])


def _clip_error(record):
    return max(find_error(record)[1], LEAST_ERROR)


def _mark_setting(axes, error, record, style):
    """Star a method's defaults; leave the number of passes to be written once all is laid out."""
    time = find_time(record).median
    if sweep := _SWEEP.search(record["implementation"]):
        axes.passes = [*getattr(axes, "passes", []), (error, time, sweep[1])]
    else:
        axes.plot(error, time, "*", color=style["color"], markersize=13, markeredgecolor="white",
                  zorder=4)  # fmt: skip


def _annotate_passes(figure, panels):
    """Write the number of passes at the points that have room for it."""
    figure.draw_without_rendering()
    for axes in panels:
        passes = getattr(axes, "passes", [])
        markers = [
            tuple(point)
            for line in axes.lines if line.get_marker() not in ("None", "")
            for point in axes.transData.transform(line.get_xydata())
        ]  # fmt: skip
        written = []
        for error, time, number in passes:
            x, y = axes.transData.transform((error, time))
            spot = (x + 12, y + 11)
            others = [point for point in markers if math.dist(point, (x, y)) > 1]
            if all(math.dist(spot, point) > 14 for point in [*others, *written]):
                written.append(spot)
                text = axes.annotate(number, (error, time), (4, 3), textcoords="offset points",
                                     fontsize=7, color=_BLUE)  # fmt: skip
                text.set_in_layout(False)


def _scale_errors(axes, largest):
    from matplotlib.ticker import NullLocator

    powers = range(-9, max(-6, math.ceil(math.log10(max(largest, LEAST_ERROR)))) + 1, 2)
    axes.set_xscale("log")
    axes.set_xlim(0.05 * LEAST_ERROR, max(3e-7, 3 * largest))
    axes.axvspan(0.05 * LEAST_ERROR, LEAST_ERROR, color="#EEEEEE", zorder=0)
    axes.set_xticks([10.0**power for power in powers])
    axes.set_xticklabels([f"≤1e{power}" if power == -9 else f"1e{power}" for power in powers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("excess error")
    _scale_times(axes)


def _add_frontier_legend(figure, records, styles):
    from matplotlib.lines import Line2D

    names = dict.fromkeys(_name_method(record) for record in records)
    handles = [Line2D([], [], label=name, **styles[name]) for name in names]
    star = Line2D([], [], linestyle="", marker="*", color="#444444", markersize=11,
                  label="star: a method's defaults")  # fmt: skip
    number = Line2D([], [], linestyle="", marker="$8$", color=_BLUE, label="number: passes")
    figure.legend(handles=[*handles, star, number], loc="outside lower center", ncols=4, fontsize=8)


def _name_method(record):
    """Return the implementation without its number of passes."""
    return _SWEEP.sub("", record["implementation"])


# What varies: the case fields that stay, the coordinate, its name.
_VARIED = {
    "size": (("rank", "spectrum", "dtype", "batch", "tokens"), lambda case: case["m"] * case["n"],
             "elements of the matrix"),
    "rank": (("shape", "spectrum", "dtype", "batch", "tokens"), lambda case: case["rank"],
             "rank"),
    "batch": (("shape", "rank", "spectrum", "dtype", "tokens"), lambda case: case["batch"],
              "matrices in the batch"),
    "tokens": (("shape", "rank", "spectrum", "dtype", "batch"), lambda case: case["tokens"],
               "tokens"),
}  # fmt: skip


def draw_times(records, title, varied):
    """Return the figure of time against size, rank, batch or tokens, or None."""
    kept, coordinate, label = _VARIED[varied]
    families = _find_families(records, kept, coordinate)
    if not families:
        return None
    shown = _choose_families(families)
    title = _count_panels(title, len(shown), len(families), "families of cases")
    figure, panels = _make_panels(len(shown), title, records, height=4.4)
    for axes, key in zip(panels, shown, strict=True):
        _draw_family(axes, families[key], coordinate)
        axes.set_title(f"{key[1]}\n{_name_family(kept, key[2:])}", fontsize=9)
        axes.set_xlabel(label)
    return figure


def _find_families(records, kept, coordinate):
    """Return {(suite, operation, *kept fields): {implementation: records}}, lines of two points."""
    families = {}
    for record in records:
        case = _extend_case(record["case"])
        if record["role"] == "limit" or _SWEEP.search(record["implementation"]):
            continue
        if coordinate(case) > 0:  # a case of no matrix has sizes of 0
            key = (record["suite"], record["operation"], *(case[field] for field in kept))
            lines = families.setdefault(key, {})
            lines.setdefault(record["implementation"], []).append(record)
    for key in list(families):
        families[key] = {
            name: line for name, line in families[key].items()
            if len({coordinate(_extend_case(record["case"])) for record in line}) > 1
        }  # fmt: skip
    return {key: lines for key, lines in families.items() if lines}


def _choose_families(families):
    """Return the keys to show: the longest family of each operation first."""
    lengths = {key: max(map(len, lines.values())) for key, lines in families.items()}
    seen, ranked = {}, []
    for key in sorted(families, key=lambda key: -lengths[key]):
        seen[key[:2]] = seen.get(key[:2], 0) + 1
        ranked.append((seen[key[:2]], -lengths[key], key))
    chosen = [key for *_, key in sorted(ranked, key=lambda each: each[:2])[:MAX_PANELS]]
    return sorted(chosen, key=list(families).index)


def _draw_family(axes, lines, coordinate):
    styles = _assign_styles([line[0] for line in lines.values()])
    for name, line in lines.items():
        line.sort(key=lambda record: coordinate(_extend_case(record["case"])))
        values = [coordinate(_extend_case(record["case"])) for record in line]
        style = {**styles[name], "linestyle": "-" if line[0]["role"] == "jlora" else ":"}
        _plot_times(axes, values, line, style, label=name)
    ticks = sorted({coordinate(_extend_case(record["case"]))
                    for line in lines.values() for record in line})  # fmt: skip
    _scale_values(axes, ticks)
    _scale_times(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7)


def _scale_values(axes, values):
    """Put a tick at every measured value that is not too near the one before."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    apart = (values[-1] / values[0]) ** 0.12
    ticks = values[:1]
    for value in values[1:]:
        if value >= apart * ticks[-1]:
            ticks.append(value)
    axes.set_xticks(ticks)
    axes.set_xticklabels([_format_value(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _name_family(kept, values):
    words = {"shape": lambda value: f"{value[0]}×{value[1]}", "rank": lambda value: f"rank {value}",
             "batch": lambda value: f"batch of {value}" if value > 1 else "",
             "tokens": lambda value: f"{value} tokens" if value else ""}  # fmt: skip
    parts = [words.get(field, str)(value) for field, value in zip(kept, values, strict=True)]
    return ", ".join(part for part in parts if part)


def _extend_case(case):
    return {**case, "shape": (case["m"], case["n"]), "batch": max(case["layers"], 1)}


def draw_roofline(records, title):
    """Return the figure of achieved rate against intensity, with the measured limits, or None."""
    points = [
        record for record in records
        if record["flops"] and record["bytes"] and record["limits"]
        and not _SWEEP.search(record["implementation"])
    ]  # fmt: skip
    if not points:
        return None
    figure, (axes,) = _make_panels(1, title, points, width=9.5, height=5.5)
    _draw_limits(axes, points)
    operations = list(dict.fromkeys(record["operation"] for record in points))
    for index, operation in enumerate(operations):
        members = [record for record in points if record["operation"] == operation]
        colour = (*_OUR_COLOURS, *_PEER_COLOURS)[index % 8]
        marker = "o" + _PEER_MARKERS
        for role, face in (("peer", "none"), ("jlora", colour)):
            shown = [record for record in members if record["role"] == role]
            axes.plot(
                [record["flops"] / record["bytes"] for record in shown],
                [1e3 * record["flops"] / find_time(record).median for record in shown],
                linestyle="", marker=marker[index % len(marker)], color=colour,
                markerfacecolor=face, markersize=6, alpha=0.8,
                label=operation if role == "jlora" else None,
            )  # fmt: skip
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
    for (dtype, flops, rate), style in zip(limits, ("-", "--", "-.", ":") * 9, strict=False):
        axes.plot(
            [least, flops / rate, most], [least * rate, flops, flops], style, color="#444444",
            linewidth=1.2,
            label=f"limit, {dtype}: {_format_value(flops)}flop/s, {_format_value(rate)}B/s",
        )  # fmt: skip


def _list_limits(records):
    """Return (dtype, flops/s, bytes/s) of the newest run of each dtype."""
    newest = {}
    for record in records:
        dtype = record["case"]["dtype"]
        newest[dtype] = max(newest.get(dtype, ""), record["time"])
    return sorted({
        (record["case"]["dtype"], record["limits"]["flops_per_s"], record["limits"]["bytes_per_s"])
        for record in records if record["time"] == newest[record["case"]["dtype"]]
    })  # fmt: skip


def draw_memory(records, title):
    """Return the figure of the peak memory of compiled programs, a panel an operation, or None."""
    records = [record for record in records if record["peak_bytes"] and record["role"] != "limit"]
    problems = {}
    for record in records:
        problems.setdefault(name_problem(record), []).append(record)
    shown = _choose_problems(problems)
    if not shown:
        return None
    most_bars = max(len(problems[problem]) for problem in shown)
    figure, panels = _make_panels(
        len(shown), _count_panels(title, len(shown), len(problems), "problems"), records,
        width=5.4, height=1.3 + 0.22 * most_bars,
    )  # fmt: skip
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
    colours = [_BLUE if record["role"] == "jlora" else _ORANGE for record in records]
    bars = axes.barh(range(len(records)), sizes, color=colours)
    axes.bar_label(bars, [_format_value(size) for size in sizes], padding=3, fontsize=8)
    axes.set_yticks(range(len(records)), [record["implementation"] for record in records])
    axes.tick_params(labelsize=8)
    axes.set_ylim(max(len(records), 6) - 0.4, -0.6)  # downwards, and few bars not too thick
    axes.set_xlim(0, 1.2 * max(sizes))
    axes.set_xlabel("MiB: arguments, results, temporaries", fontsize=8)


def _plot_times(axes, values, records, style, label=None):
    """Draw medians, with the quartiles as thin bars."""
    times = [find_time(record) for record in records]
    medians = [time.median for time in times]
    below = [time.median - time.lower for time in times]
    above = [time.upper - time.median for time in times]
    axes.errorbar(values, medians, (below, above), elinewidth=0.8, alpha=0.9, label=label, **style)


def _assign_styles(records):
    """Return {implementation without its passes: style}, jlora joined and solid, peers marked."""
    styles, ours, peers = {}, 0, 0
    for record in records:
        name = _name_method(record)
        if name in styles:
            continue
        if record["role"] == "jlora":
            styles[name] = {"color": _OUR_COLOURS[ours % len(_OUR_COLOURS)], "marker": "o",
                            "markersize": 4, "linestyle": "-"}  # fmt: skip
            ours += 1
        else:
            styles[name] = {"color": _PEER_COLOURS[peers % len(_PEER_COLOURS)],
                            "marker": _PEER_MARKERS[peers % len(_PEER_MARKERS)],
                            "markersize": 6, "linestyle": ""}  # fmt: skip
            peers += 1
    return styles


def _make_panels(count, title, records, width=4.6, height=3.9):
    """Return a figure of `count` axes under a title that names the device and the commit."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    columns = min(count, 3)
    rows = -(-count // columns)
    size = max(width * columns, 9.5), height * rows + 1.4
    figure = Figure(figsize=size, layout="constrained")
    commits = describe_commits(records)
    if len(commits) > 60:
        commits = "several commits"
    figure.suptitle(f"{title}\n{describe_machine(records)}, commit {commits}", fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels[:count]


def _count_panels(title, shown, total, noun):
    if shown == total:
        return title
    return f"{title} ({shown} of {total} {noun}; all are in the tables)"


def _scale_times(axes):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    least, most = axes.get_ylim()
    wide = most / least > 300
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("ms")


def _format_value(value):
    """Return three digits and the thousand: 4.19 M."""
    for factor, sign in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= factor:
            return f"{value / (1e3 if sign == ' k' else factor):.3g}{sign}"
    return f"{value:.0f} " if value >= 1000 else f"{value:.3g} "


def _is_finite(value):
    return value is not None and math.isfinite(value)


def _times_against(varied):
    return f"Time against {varied}", lambda records, title: draw_times(records, title, varied)


_PLOTS = {
    "frontier": ("Truncated SVD: time against excess error", draw_frontier),
    "time-against-size": _times_against("size"),
    "time-against-rank": _times_against("rank"),
    "time-against-batch": _times_against("batch"),
    "time-against-tokens": _times_against("tokens"),
    "roofline": ("Roofline: rates against the measured limits", draw_roofline),
    "memory": ("Peak memory of compiled JAX programs", draw_memory),
}
