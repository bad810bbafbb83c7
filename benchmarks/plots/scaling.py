"""The plots of time against size, rank, batch or tokens."""

from benchmarks.plots.style import (
    MAX_PANELS,
    SWEEP,
    assign_styles,
    count_panels,
    format_value,
    make_panels,
    plot_times,
    scale_times,
)

# What varies: the case fields that stay, the coordinate, its name.
_VARIED = {
    "size": (
        ("rank", "spectrum", "dtype", "batch", "tokens"),
        lambda case: case["m"] * case["n"],
        "elements of the matrix",
    ),
    "rank": (
        ("shape", "spectrum", "dtype", "batch", "tokens"),
        lambda case: case["rank"],
        "rank",
    ),
    "batch": (
        ("shape", "rank", "spectrum", "dtype", "tokens"),
        lambda case: case["batch"],
        "matrices in the batch",
    ),
    "tokens": (
        ("shape", "rank", "spectrum", "dtype", "batch"),
        lambda case: case["tokens"],
        "tokens",
    ),
}


def draw_times(records, title, varied):
    """Return the figure of time against size, rank, batch or tokens, or None."""
    kept, coordinate, label = _VARIED[varied]
    families = _find_families(records, kept, coordinate)
    if not families:
        return None
    shown = _choose_families(families)
    title = count_panels(title, len(shown), len(families), "families of cases")
    figure, panels = make_panels(len(shown), title, records, height=4.4)
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
        if record["role"] == "limit" or SWEEP.search(record["implementation"]):
            continue
        if coordinate(case) > 0:  # a case of no matrix has sizes of 0
            key = (
                record["suite"],
                record["operation"],
                *(case[field] for field in kept),
            )
            lines = families.setdefault(key, {})
            lines.setdefault(record["implementation"], []).append(record)
    for key in list(families):
        families[key] = {
            name: line
            for name, line in families[key].items()
            if len({coordinate(_extend_case(record["case"])) for record in line}) > 1
        }
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
    styles = assign_styles([line[0] for line in lines.values()])
    for name, line in lines.items():
        line.sort(key=lambda record: coordinate(_extend_case(record["case"])))
        values = [coordinate(_extend_case(record["case"])) for record in line]
        style = {
            **styles[name],
            "linestyle": "-" if line[0]["role"] == "jlora" else ":",
        }
        plot_times(axes, values, line, style, label=name)
    ticks = sorted(
        {
            coordinate(_extend_case(record["case"]))
            for line in lines.values()
            for record in line
        }
    )
    _scale_values(axes, ticks)
    scale_times(axes)
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
    axes.set_xticklabels([format_value(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _name_family(kept, values):
    words = {
        "shape": lambda value: f"{value[0]}×{value[1]}",
        "rank": lambda value: f"rank {value}",
        "batch": lambda value: f"batch of {value}" if value > 1 else "",
        "tokens": lambda value: f"{value} tokens" if value else "",
    }
    parts = [
        words.get(field, str)(value) for field, value in zip(kept, values, strict=True)
    ]
    return ", ".join(part for part in parts if part)


def _extend_case(case):
    return {**case, "shape": (case["m"], case["n"]), "batch": max(case["layers"], 1)}
