"""The tables of the newest records of one kind of device, and the README's part of them."""

from benchmarks.plots.draw import draw_plots
from benchmarks.plots.style import can_draw
from benchmarks.report.statistics import (
    choose_cases,
    describe_commits,
    describe_dates,
    describe_machine,
    find_error,
    find_fastest_peer,
    find_time,
    is_measured,
    is_same_run,
    name_problem,
    ratio_of_medians,
)
from benchmarks.run.environment import name_device_folder

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
LOAD_MARGIN = (
    0.5  # of the load average above the threads that the benchmark itself keeps busy
)
OTHERS_CORES = 0.5  # kept busy by other processes
MAX_README_CASES = 8
DEFAULT = "jlora krylov"
MAIN_PEERS = (
    "torch.svd_lowrank niter 4",
    "torch.svd_lowrank niter 16",
    "sklearn randomized_svd",
    "scipy svds",
    "jnp.linalg.svd",
)
_NONE = "–"
_GUIDE = """\
Times are medians in ms, with the quartiles in brackets. A ratio is the time of jlora over that of
a peer: below 1 jlora is faster; it is the median over the rounds in which both ran. One ratio is
to the fastest peer whose error is no larger than 1.05 times jlora's plus 1e-6, the other to the
fastest of all. The floor is the time that the least flops and bytes of the operation take at the
limits measured in the same run. Peak memory is that of one compiled program: arguments, results
and temporaries."""
_BUSY_MARK = "‡"
# Said in the README too: the thread pools of torch and BLAS suffer most, which flatters jlora.
_BUSY = f"{_BUSY_MARK} Other processes kept a core busy meanwhile, which slows some peers most."
_ACROSS_RUNS = (
    "† of two runs: the medians are divided, and the machine may have changed between."
)


def write_report(records, folder):
    """Write report.md and its plots into a folder, and return the paths, report.md first."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw_plots(records, folder) if can_draw() else None
    path = folder / "report.md"
    path.write_text(make_report(records, plots), encoding="utf-8")
    return [path, *(plots or {}).values()]


def make_report(records, plots):
    """Return the text of the report. plots: {title: path}, None without matplotlib."""
    parts = [_make_header(records), _GUIDE, _show_plots(plots)]
    for suite in _list_values(records, "suite"):
        parts.append(f"## {suite}")
        of_suite = [record for record in records if record["suite"] == suite]
        for operation in _list_values(of_suite, "operation"):
            members = [
                record for record in of_suite if record["operation"] == operation
            ]
            parts += [
                f"### {suite}: {operation}",
                *_make_tables(members),
                _list_settings(members),
            ]
    text = "\n\n".join(part for part in parts if part)
    return f"{text}\n\n{_ACROSS_RUNS}\n" if "†" in text else f"{text}\n"


def _make_header(records):
    versions = {}
    for record in records:
        for package, version in record["versions"].items():
            versions.setdefault(package, {})[version] = None
    lines = [
        f"# Benchmarks on {describe_machine(records)}",
        "",
        f"- measured {describe_dates(records)}, level {', '.join(_list_values(records, 'level'))}",
        f"- commit {describe_commits(records)}",
        "- "
        + ", ".join(
            f"{package} {' and '.join(versions[package])}" for package in versions
        ),
        *_list_limits(records),
    ]
    return "\n".join(
        [*lines, *(f"\n**Warning:** {each}" for each in _list_warnings(records))]
    )


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
            f"{dirty} of {len(records)} records were measured with changes that were not committed."
        )
    if busy := [
        record for record in records if is_measured(record) and _was_busy(record)
    ]:
        load = max(record["load"] for record in busy)
        others = _count_others(busy)
        warnings.append(
            f"{len(busy)} of {len(records)} records were measured beside other work: "
            f"the load average was up to {load:g}, others kept up to {others:g} cores busy."
        )
    return warnings


def _was_busy(record):
    too_much = record["host"]["threads"] + LOAD_MARGIN
    return record["load"] > too_much or _count_others([record]) > OTHERS_CORES


def _count_others(records):
    return max(record["others_cores"] or 0 for record in records)


def _show_plots(plots):
    if plots is None:
        return "There are no plots: matplotlib is not installed."
    return "\n\n".join(f"![{title}]({path.name})" for title, path in plots.items())


def _make_tables(records):
    """Return, for each case of an operation, its heading, table, and what was not measured."""
    parts = []
    for problem in dict.fromkeys(map(name_problem, records)):
        of_case = [record for record in records if name_problem(record) == problem]
        measured = [record for record in of_case if is_measured(record)]
        others = _count_others(of_case)
        busy = f" — others kept {others:g} cores busy" if others > OTHERS_CORES else ""
        parts.append(f"**{problem[2]}**{busy}")
        if measured:
            parts.append(_make_case_table(measured))
        gaps = [
            f"- {record['implementation']}: {record['status']}, {record['reason']}"
            for record in of_case
            if not is_measured(record)
        ]
        if gaps:
            parts.append("\n".join(["Not measured:", "", *gaps]))
    return parts


def _make_case_table(records):
    kind = next((find_error(record)[0] for record in records if record["errors"]), None)
    columns = {
        "implementation": lambda record: record["implementation"],
        "ms": lambda record: _format_times(find_time(record)),
        "× fastest peer as exact": lambda record: _format_ratio(
            record, records, as_exact=True
        ),
        "× fastest peer": lambda record: _format_ratio(record, records, as_exact=False),
        "× floor": lambda record: _divide(find_time(record).median, record["floor_ms"]),
        kind or "error": lambda record: _format_error(record["errors"].get(kind)),
        "compile ms": lambda record: _divide(record["compile_ms"], 1),
        "peak MiB": lambda record: _divide(record["peak_bytes"], 2**20),
    }
    rows = [[cell(record) for cell in columns.values()] for record in records]
    # A column that nobody fills (limits have no peers) says nothing.
    kept = [i for i in range(len(columns)) if any(row[i] != _NONE for row in rows)]
    header = list(columns)
    return make_table(
        [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    )


def _format_ratio(record, records, *, as_exact):
    """Return the ratio of one of jlora's records to a peer, which is named."""
    if record["role"] != "jlora" or not any(
        other["role"] == "peer" for other in records
    ):
        return _NONE
    peer = find_fastest_peer(record, records, as_exact=as_exact)
    if peer is None:
        return "no peer as exact"
    ratio = ratio_of_medians(record, peer)
    mark = "" if is_same_run(record, peer) else "†"
    return f"{_format_times(ratio)}{mark} of {peer['implementation']}"


def _list_settings(records):
    settings = {}
    for record in records:
        settings.setdefault((record["implementation"], record["setting"]), None)
    return "\n".join(
        ["Settings:", "", *(f"- {name}: {setting}" for name, setting in settings)]
    )


def make_main_table(records):
    """Return the short table of the truncated SVD: jlora's default beside its main peers."""
    found = {
        (record["case"]["name"], record["implementation"]): record
        for record in records
        if record["operation"] == "truncated svd" and is_measured(record)
    }
    ours = [record for (_, name), record in found.items() if name == DEFAULT]
    peers = [peer for peer in MAIN_PEERS if any(name == peer for _, name in found)]
    rows = []
    for case in choose_cases(ours, MAX_README_CASES):
        record = found[case["name"], DEFAULT]
        times = [found.get((case["name"], name)) for name in (DEFAULT, *peers)]
        rows.append(
            [
                case["name"]
                + (_BUSY_MARK if _count_others([record]) > OTHERS_CORES else ""),
                *map(_format_time_and_error, times),
                *(
                    _format_short_ratio(record, list(found.values()), exact)
                    for exact in (True, False)
                ),
            ]
        )
    header = [
        "case",
        DEFAULT,
        *peers,
        "jlora × fastest peer as exact",
        "jlora × fastest peer",
    ]
    return make_table(header, rows)


def _format_time_and_error(record):
    if record is None:
        return _NONE
    return f"{format_number(find_time(record).median)}, {_format_error(find_error(record)[1])}"


def _format_short_ratio(record, records, as_exact):
    peer = find_fastest_peer(record, records, as_exact=as_exact)
    if peer is None:
        return "no peer as exact" if as_exact else _NONE
    return f"{format_number(ratio_of_medians(record, peer).ratio)} of {peer['implementation']}"


def make_readme_block(records):
    """Return what the README says of the records: the main table, and where the rest is."""
    svds = [record for record in records if record["operation"] == "truncated svd"]
    if not svds:
        raise ValueError(
            "`records` must hold a truncated svd, got none. Run `python -m benchmarks run`."
        )
    num_cases = len(
        {
            record["case"]["name"]
            for record in svds
            if record["implementation"] == DEFAULT and is_measured(record)
        }
    )
    left_out = max(0, num_cases - MAX_README_CASES)
    more = f" ({left_out} more cases are there)" if left_out else ""
    report = (
        f"benchmarks/results/{name_device_folder(svds[0]['device']['kind'])}/report"
    )
    table = make_main_table(svds)
    busy = f"\n{_BUSY}\n" if _BUSY_MARK in table else ""
    return f"""\
Truncated SVD on {describe_machine(svds)}; commit {describe_commits(svds)}, {describe_dates(svds)}.
Each cell: median ms, then the excess error ‖a − u s vt‖ / ‖a − a_k‖ − 1 over the optimum. The last
columns: the time of jlora over that of a peer, below 1 where jlora is faster; as exact means an
error of at most 1.05 times jlora's plus 1e-6.

{table}
{busy}
![Time against excess error of jlora's settings and its peers]({report}/frontier.png)

Every table, with quartiles, memory and compile times: [report]({report}/report.md){more}.
"""


def update_readme(path, block):
    """Replace the text between the two markers of a README.

    Raises:
        ValueError: the file does not hold each marker once, as lines, in this order.
    """
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    where = [i for i, line in enumerate(lines) if line in (BEGIN, END)]
    if [lines[i] for i in where] != [BEGIN, END]:
        raise ValueError(
            f"{path} must hold the line `{BEGIN}` and, below it, the line `{END}`, once each. "
            "Put them where the table shall stand."
        )
    lines[where[0] + 1 : where[1]] = block.strip().splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_table(header, rows):
    """Return a Markdown table of texts, numbers to the right of the first column."""
    marks = [":--", *["--:"] * (len(header) - 1)]
    escaped = [
        [cell.replace("|", "\\|") for cell in row] for row in [header, marks, *rows]
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def format_number(value):
    """Return three digits, never as a power of ten."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.5f}"


def _format_times(spread):
    middle, lower, upper, count = spread
    runs = "one run" if count == 1 else f"{format_number(lower)}–{format_number(upper)}"
    return f"{format_number(middle)} ({runs})"


def _format_error(error):
    return _NONE if error is None else f"{error:.1e}"


def _divide(value, unit):
    return _NONE if value is None or not unit else format_number(value / unit)


def _list_values(records, field):
    return list(dict.fromkeys(record[field] for record in records))
