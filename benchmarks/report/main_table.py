"""The short table of the truncated SVD: jlora's default beside its main peers."""

from benchmarks.report.markdown import (
    BUSY_MARK,
    BUSY_NOTE,
    NONE,
    format_error,
    format_number,
    make_table,
)
from benchmarks.report.statistics import (
    choose_cases,
    find_error,
    find_fastest_peer,
    find_time,
    is_disturbed,
    is_measured,
    ratio_of_medians,
)

MAX_CASES = 8
DEFAULT = "jlora krylov"
MAIN_PEERS = (
    "torch.svd_lowrank niter 4",
    "torch.svd_lowrank niter 16",
    "sklearn randomized_svd",
    "scipy svds",
    "jnp.linalg.svd",
)
_GUIDE = """\
Each cell: median ms, then the excess error over the optimum,
‖a − u s vt‖ / ‖a − a_k‖ − 1. The last two columns are jlora's time divided by the time
of the peer that they name."""


def make_main_section(records):
    """Return the paragraphs of the report that show the main table; may be none."""
    svds = [record for record in records if _is_measured_svd(record)]
    if not svds:
        return []

    table = make_main_table(svds)
    notes = [BUSY_NOTE] if BUSY_MARK in table else []
    return ["## jlora's default beside its main peers", _GUIDE, table, *notes]


def make_main_table(records):
    """Return the table of the `MAX_CASES` cases that differ most from each other."""
    found = {
        (record["case"]["name"], record["implementation"]): record
        for record in records
        if _is_measured_svd(record)
    }
    ours = [record for (_, name), record in found.items() if name == DEFAULT]
    peers = [peer for peer in MAIN_PEERS if any(name == peer for _, name in found)]

    rows = []
    for case in choose_cases(ours, MAX_CASES):
        record = found[case["name"], DEFAULT]
        mark = BUSY_MARK if is_disturbed([record]) else ""
        beside = [found.get((case["name"], name)) for name in (DEFAULT, *peers)]
        row = [case["name"] + mark, *map(format_time_and_error, beside)]
        for as_exact in (True, False):
            row.append(_format_ratio(record, list(found.values()), as_exact))
        rows.append(row)

    ratios = ["jlora × fastest peer as exact", "jlora × fastest peer"]
    return make_table(["case", DEFAULT, *peers, *ratios], rows)


def _is_measured_svd(record):
    return record["operation"] == "truncated svd" and is_measured(record)


def format_time_and_error(record):
    """Return `median ms, error` of a record, or a dash for None."""
    if record is None:
        return NONE
    time, error = find_time(record).median, find_error(record)[1]
    return f"{format_number(time)}, {format_error(error)}"


def _format_ratio(record, records, as_exact):
    peer = find_fastest_peer(record, records, as_exact=as_exact)
    if peer is None:
        return "no peer as exact" if as_exact else NONE
    ratio = ratio_of_medians(record, peer).ratio
    return f"{format_number(ratio)} of {peer['implementation']}"
