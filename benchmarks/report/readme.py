"""The short block of README.md: three rows, one picture, a link to the full report."""

from typing import NamedTuple

from benchmarks.report.main_table import DEFAULT, format_time_and_error
from benchmarks.report.markdown import (
    BUSY_MARK,
    BUSY_NOTE,
    TWO_RUNS_MARK,
    TWO_RUNS_NOTE,
    format_number,
    make_table,
)
from benchmarks.report.statistics import (
    describe_commits,
    describe_dates,
    describe_machine,
    find_fastest_peer,
    is_disturbed,
    is_measured,
    is_same_run,
    name_problem,
    ratio_of_medians,
)
from benchmarks.run.cases import Case
from benchmarks.run.environment import name_device_folder

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


class ReadmeRow(NamedTuple):
    """One comparison that the README shows."""

    label: str
    problem: tuple[str, str, str]  # suite, operation, case name
    ours: str  # the implementation of jlora
    peer: str | None = None  # None: the fastest peer that is as exact


_SQUARE = Case("llama-3.2-1b", "attention", 64)
_MERGED = Case("llama-2-7b", "attention", 16, "factors")
_WHOLE_MODEL = "Llama-shaped, hidden 2048, 8 layers, 56 matrices, rank 16, float32"
# The rows are fixed, so that no result chooses them. For a whole model the only peer as
# exact is the full SVD, at 97 s: the fairer comparison is the randomised one.
ROWS = (
    ReadmeRow(
        "Truncated SVD, 2048×2048, rank 64",
        ("factorization", "truncated svd", _SQUARE.name),
        DEFAULT,
    ),
    ReadmeRow(
        "Merge into a donated weight, 4096×4096, rank 16",
        ("reconstruction", "reconstruct donated", _MERGED.name),
        "jlora reconstruct",
    ),
    ReadmeRow(
        "PiSSA initialisation of 56 matrices, rank 16",
        ("adaptation", "pissa initialisation", _WHOLE_MODEL),
        "jlora adapt",
        "peft pissa_niter_16",
    ),
)
_HEADER = ("float32", "jlora: ms, error", "peer: ms, error", "jlora's time / peer's")
_GUIDE = """\
Times are medians. The error is the excess over the best error at that rank; for the
merge it is the relative error. The peer is the fastest one that is as exact (error at
most 1.05 times jlora's plus 1e-6); for PiSSA it is PEFT's randomised method."""


def make_readme_block(records):
    """Return the text between the markers of the README.

    A row with missing records is left out.

    Raises:
        ValueError: No row has its records.
    """
    pairs = [(row, _find_pair(row, records)) for row in ROWS]
    pairs = [(row, pair) for row, pair in pairs if pair is not None]
    if not pairs:
        raise ValueError(
            "`records` must hold both sides of a row of the README, got none. "
            "Run `python -m benchmarks run --full`."
        )

    shown = [record for _, pair in pairs for record in pair]
    machine, commits = describe_machine(shown), describe_commits(shown)
    table = make_table(_HEADER, [_make_row(row, *pair) for row, pair in pairs])
    marked = ((BUSY_MARK, BUSY_NOTE), (TWO_RUNS_MARK, TWO_RUNS_NOTE))
    notes = [note for mark, note in marked if mark in table]

    folder = name_device_folder(shown[0]["device"]["kind"])
    report = f"benchmarks/results/{folder}/report"
    title = "Time against excess error of jlora's settings and its peers"
    paragraphs = [
        f"Measured on {machine}; commit {commits}, {describe_dates(shown)}.\n{_GUIDE}",
        table,
        *notes,
        f"![{title}]({report}/frontier.png)",
        f"All tables, with quartiles, memory and compile times: "
        f"[report]({report}/report.md).",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _find_pair(row, records):
    """Return the records of the two sides of a row, or None where one is missing."""
    found = {
        record["implementation"]: record
        for record in records
        if name_problem(record) == row.problem and is_measured(record)
    }
    ours = found.get(row.ours)
    if ours is None:
        return None

    if row.peer is None:
        peer = find_fastest_peer(ours, list(found.values()), as_exact=True)
    else:
        peer = found.get(row.peer)
    return None if peer is None else (ours, peer)


def _make_row(row, ours, peer):
    busy = BUSY_MARK if is_disturbed([ours, peer]) else ""
    two_runs = "" if is_same_run(ours, peer) else TWO_RUNS_MARK
    ratio = format_number(ratio_of_medians(ours, peer).ratio)
    return [
        row.label + busy,
        format_time_and_error(ours),
        f"{peer['implementation']}: {format_time_and_error(peer)}",
        ratio + two_runs,
    ]


def update_readme(path, block):
    """Replace the text between the two markers of a README.

    Raises:
        ValueError: The file does not hold each marker once, as a line, in this order.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    markers = [i for i, line in enumerate(lines) if line in (BEGIN, END)]
    if [lines[i] for i in markers] != [BEGIN, END]:
        raise ValueError(
            f"{path} must hold the line `{BEGIN}` and, below it, the line `{END}`, "
            "once each. Put them where the table shall stand."
        )

    first, last = markers
    lines[first + 1 : last] = block.strip().splitlines()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
