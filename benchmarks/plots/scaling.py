"""The plots of time against size, rank, batch or tokens.

A family is a set of cases of one operation that differ in one property only. Each
family gets a panel, with one line for each implementation.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.plots.style import (
    MAX_PANELS,
    SWEEP,
    assign_styles,
    count_in_title,
    format_value,
    make_panels,
    plot_times,
    scale_times,
)


class _Axis(NamedTuple):
    """The property of a case that varies along the horizontal axis."""

    fixed: tuple[str, ...]  # the fields of a case that all members of a family share
    measure: Callable[[dict], int]  # a case → its coordinate; 0: it has none
    label: str


_AXES = {
    "size": _Axis(
        ("rank", "spectrum", "dtype", "batch", "tokens"),
        lambda case: case["m"] * case["n"],
        "elements of the matrix",
    ),
    "rank": _Axis(
        ("shape", "spectrum", "dtype", "batch", "tokens"),
        lambda case: case["rank"],
        "rank",
    ),
    "batch": _Axis(
        ("shape", "rank", "spectrum", "dtype", "tokens"),
        lambda case: case["batch"],
        "matrices in the batch",
    ),
    "tokens": _Axis(
        ("shape", "rank", "spectrum", "dtype", "batch"),
        lambda case: case["tokens"],
        "tokens",
    ),
}


def draw_times(records, title, varied):
    """Return the figure of time against size, rank, batch or tokens, or None."""
    fixed, measure, label = _AXES[varied]

    def measure_record(record):
        return measure(_extend_case(record["case"]))

    families = _find_families(records, fixed, measure_record)
    if not families:
        return None

    shown = _choose_families(families)
    title = count_in_title(title, len(shown), len(families), "families of cases")
    figure, panels = make_panels(len(shown), title, records, height=4.4)
    for axes, key in zip(panels, shown, strict=True):
        _, operation, *values = key
        _draw_family(axes, families[key], measure_record)
        axes.set_title(f"{operation}\n{_name_family(fixed, values)}", fontsize=9)
        axes.set_xlabel(label)
    return figure


def _extend_case(case):
    """Return the fields of a case, with its shape and batch."""
    return {**case, "shape": (case["m"], case["n"]), "batch": max(case["layers"], 1)}


def _find_families(records, fixed, measure):
    """Return {(suite, operation, *values of the fixed fields): lines}.

    The lines are {implementation: records}, each with two different coordinates at
    least.
    """
    families = {}
    for record in records:
        is_sweep = SWEEP.search(record["implementation"])
        if record["role"] != "limit" and not is_sweep and measure(record) > 0:
            case = _extend_case(record["case"])
            values = [case[field] for field in fixed]
            lines = families.setdefault(
                (record["suite"], record["operation"], *values), {}
            )
            lines.setdefault(record["implementation"], []).append(record)

    for key, lines in families.items():
        families[key] = {
            name: line
            for name, line in lines.items()
            if len(set(map(measure, line))) > 1
        }
    return {key: lines for key, lines in families.items() if lines}


def _choose_families(families):
    """Return the keys to show: first the longest family of each operation."""
    lengths = {key: max(map(len, lines.values())) for key, lines in families.items()}

    ranked, num_ranked = [], {}
    for key in sorted(families, key=lambda key: -lengths[key]):
        operation = key[:2]
        num_ranked[operation] = num_ranked.get(operation, 0) + 1
        ranked.append((num_ranked[operation], -lengths[key], key))

    ranked.sort(key=lambda each: each[:2])
    chosen = [key for *_, key in ranked[:MAX_PANELS]]
    return sorted(chosen, key=list(families).index)


def _draw_family(axes, lines, measure):
    """Draw one line for each implementation, with ticks at the measured values."""
    styles = assign_styles([line[0] for line in lines.values()])
    ticks = set()
    for name, line in lines.items():
        line.sort(key=measure)
        values = [measure(record) for record in line]
        ticks.update(values)
        linestyle = "-" if line[0]["role"] == "jlora" else ":"
        plot_times(
            axes, values, line, {**styles[name], "linestyle": linestyle}, label=name
        )

    _scale_values(axes, sorted(ticks))
    scale_times(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=7)


def _scale_values(axes, values):
    """Put a tick at each sorted value that is not too near to the tick before it."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    min_ratio = (values[-1] / values[0]) ** 0.12
    ticks = values[:1]
    for value in values[1:]:
        if value >= min_ratio * ticks[-1]:
            ticks.append(value)

    axes.set_xticks(ticks)
    axes.set_xticklabels([format_value(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _name_family(fixed, values):
    """Return the values of the fixed fields in words."""
    words = {
        "shape": lambda value: f"{value[0]}×{value[1]}",
        "rank": lambda value: f"rank {value}",
        "batch": lambda value: f"batch of {value}" if value > 1 else "",
        "tokens": lambda value: f"{value} tokens" if value else "",
    }
    parts = [
        words.get(field, str)(value) for field, value in zip(fixed, values, strict=True)
    ]
    return ", ".join(part for part in parts if part)
