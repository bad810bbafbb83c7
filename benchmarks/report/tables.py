"""The full report of the newest records of one kind of device: tables and plots."""

from benchmarks.plots.draw import draw_plots
from benchmarks.plots.style import can_draw
from benchmarks.report.main_table import make_main_section
from benchmarks.report.markdown import (
    NONE,
    TWO_RUNS_MARK,
    TWO_RUNS_NOTE,
    format_error,
    format_number,
    format_quotient,
    format_spread,
    make_table,
)
from benchmarks.report.statistics import (
    count_others_cores,
    describe_commits,
    describe_dates,
    describe_machine,
    find_error,
    find_fastest_peer,
    find_time,
    is_disturbed,
    is_measured,
    is_same_run,
    name_problem,
    ratio_of_medians,
)

# Added to the number of threads: the load average that the benchmark itself may cause.
LOAD_MARGIN = 0.5
_GUIDE = """\
Times are medians in ms, with the quartiles in brackets. A ratio is jlora's time divided
by a peer's: below 1 jlora is faster. It is the median over the rounds in which both
ran. One ratio is to the fastest peer whose error is no larger than 1.05 times jlora's
plus 1e-6, the other to the fastest of all. The floor is the time that the fewest
possible flops and bytes of the operation take at the limits measured in the same run.
Peak memory is the sum of arguments, results and temporaries of one compiled program."""


def write_report(records, folder):
    """Write report.md and its plots into a folder; return the paths, text first."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(records, folder) if can_draw() else None
    path = folder / "report.md"
    path.write_text(make_report(records, plots), encoding="utf-8")
    return [path, *(plots or {}).values()]


def make_report(records, plots):
    """Return the text of the report.

    Args:
        plots: {title: path}, or None without matplotlib.
    """
    sections = [_make_header(records), _GUIDE, _show_plots(plots)]
    sections += make_main_section(records)

    for suite in _list_values(records, "suite"):
        sections.append(f"## {suite}")
        of_suite = [record for record in records if record["suite"] == suite]
        for operation in _list_values(of_suite, "operation"):
            members = [each for each in of_suite if each["operation"] == operation]
            sections.append(f"### {suite}: {operation}")
            sections += [*_make_tables(members), _list_settings(members)]

    text = "\n\n".join(section for section in sections if section)
    return f"{text}\n\n{TWO_RUNS_NOTE}\n" if TWO_RUNS_MARK in text else f"{text}\n"


def _make_header(records):
    versions = {}
    for record in records:
        for package, version in record["versions"].items():
            versions.setdefault(package, {})[version] = None
    packages = [f"{name} {' and '.join(each)}" for name, each in versions.items()]

    levels = ", ".join(_list_values(records, "level"))
    lines = [
        f"# Benchmarks on {describe_machine(records)}",
        "",
        f"- measured {describe_dates(records)}, level {levels}",
        f"- commit {describe_commits(records)}",
        f"- {', '.join(packages)}",
        *_list_limits(records),
    ]
    warnings = [f"\n**Warning:** {each}" for each in _list_warnings(records)]
    return "\n".join([*lines, *warnings])


def _list_limits(records):
    limits = []
    for record in records:
        if record["role"] != "limit" or not is_measured(record):
            continue
        for kind, unit in (("flops", "Gflop/s"), ("bytes", "GB/s")):
            if record[kind]:
                rate = format_number(record[kind] / min(record["times_ms"]) / 1e6)
                limits.append(f"{record['operation']} {rate} {unit}")
    return [f"- limits: {', '.join(limits)}"] if limits else []


def _list_warnings(records):
    warnings = []
    if len({record["commit"] for record in records}) > 1:
        warnings.append(
            f"the records come from several commits ({describe_commits(records)}); "
            "measure all suites again to compare them."
        )

    if dirty := sum(record["dirty"] for record in records):
        warnings.append(
            f"{dirty} of {len(records)} records were measured with changes that were "
            "not committed."
        )

    busy = [each for each in records if is_measured(each) and _was_busy(each)]
    if busy:
        load = max(record["load"] for record in busy)
        others = count_others_cores(busy)
        warnings.append(
            f"{len(busy)} of {len(records)} records were measured beside other work: "
            f"the load average was up to {load:g}, others kept up to {others:g} cores "
            "busy."
        )
    return warnings


def _was_busy(record):
    too_much = record["host"]["threads"] + LOAD_MARGIN
    return record["load"] > too_much or is_disturbed([record])


def _show_plots(plots):
    if plots is None:
        return "There are no plots: matplotlib is not installed."
    return "\n\n".join(f"![{title}]({path.name})" for title, path in plots.items())


def _make_tables(records):
    """Return, for each case of an operation, its heading, its table and its gaps."""
    sections = []
    for problem in dict.fromkeys(map(name_problem, records)):
        of_case = [record for record in records if name_problem(record) == problem]
        others = count_others_cores(of_case)
        is_busy = is_disturbed(of_case)
        busy = f" — others kept {others:g} cores busy" if is_busy else ""
        sections.append(f"**{problem[2]}**{busy}")

        measured = [record for record in of_case if is_measured(record)]
        if measured:
            sections.append(_make_case_table(measured))

        gaps = [
            f"- {record['implementation']}: {record['status']}, {record['reason']}"
            for record in of_case
            if not is_measured(record)
        ]
        if gaps:
            sections.append("\n".join(["Not measured:", "", *gaps]))
    return sections


def _make_case_table(records):
    kind = next((find_error(record)[0] for record in records if record["errors"]), None)
    header = [
        "implementation",
        "ms",
        "× fastest peer as exact",
        "× fastest peer",
        "× floor",
        kind or "error",
        "compile ms",
        "peak MiB",
    ]
    rows = [_make_row(record, records, kind) for record in records]

    # A column that no record fills says nothing; limits have no peers, for example.
    columns = zip(header, *rows, strict=True)
    filled = [column for column in columns if any(cell != NONE for cell in column[1:])]
    header, *rows = zip(*filled, strict=True)
    return make_table(header, rows)


def _make_row(record, records, kind):
    time = find_time(record)
    return [
        record["implementation"],
        format_spread(time),
        _format_ratio(record, records, as_exact=True),
        _format_ratio(record, records, as_exact=False),
        format_quotient(time.median, record["floor_ms"]),
        format_error(record["errors"].get(kind)),
        format_quotient(record["compile_ms"], 1),
        format_quotient(record["peak_bytes"], 2**20),
    ]


def _format_ratio(record, records, *, as_exact):
    """Return the ratio of one of jlora's records to a peer, with the peer's name."""
    has_peers = any(other["role"] == "peer" for other in records)
    if record["role"] != "jlora" or not has_peers:
        return NONE

    peer = find_fastest_peer(record, records, as_exact=as_exact)
    if peer is None:
        return "no peer as exact"
    mark = "" if is_same_run(record, peer) else TWO_RUNS_MARK
    ratio = format_spread(ratio_of_medians(record, peer))
    return f"{ratio}{mark} of {peer['implementation']}"


def _list_settings(records):
    settings = {(each["implementation"], each["setting"]): None for each in records}
    lines = [f"- {name}: {setting}" for name, setting in settings]
    return "\n".join(["Settings:", "", *lines])


def _list_values(records, field):
    return list(dict.fromkeys(record[field] for record in records))
