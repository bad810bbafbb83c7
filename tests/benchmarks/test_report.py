import functools
import time
import zlib

import numpy as np
import pytest

from benchmarks.plots.draw import draw_plots
from benchmarks.plots.style import can_draw
from benchmarks.report.compare import compare_records, format_comparison
from benchmarks.report.main_table import make_main_table
from benchmarks.report.readme import ROWS, make_readme_block, update_readme
from benchmarks.report.statistics import (
    choose_cases,
    find_fastest_peer,
    find_spread,
    is_as_exact,
    ratio_of_medians,
)
from benchmarks.report.tables import write_report
from benchmarks.report.targets import SVD_CASES, evaluate_targets, list_targets
from benchmarks.run.cases import Case
from benchmarks.run.contenders import Contender, Group, Level, Prepared
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import Limits
from benchmarks.run.records import SCHEMA, check_record

SQUARE = Case("gpt-2-medium", "output", 16)
PEERS = {
    "torch.svd_lowrank niter 4": (0.8, 2e-3),
    "torch.svd_lowrank niter 16": (2.0, 2e-4),
    "scipy svds": (4.0, 1e-13),
    "jnp.linalg.svd": (30.0, 1e-13),
}


def make_record(implementation="jlora krylov", times_ms=(2.0, 2.0, 2.0), **fields):
    """Return a record of the schema; `fields` replace its fields, `case` is a Case."""
    status = fields.get("status", "measured")
    times_ms = list(times_ms) if status == "measured" else []

    record = {
        **dict.fromkeys(SCHEMA),
        "schema": 1,
        "time": "2026-01-02T03:04:05+00:00",
        "level": "quick",
        "suite": "factorization",
        "operation": "truncated svd",
        "implementation": implementation,
        "role": "jlora" if implementation.startswith("jlora") else "peer",
        "setting": f"setting of {implementation}",
        "status": status,
        "times_ms": times_ms,
        "rounds": list(range(len(times_ms))),
        "errors": {"excess error": 1e-5, "energy": 0.9} if times_ms else {},
        "flops": 2e8,
        "bytes": 1e7,
        "floor_ms": 0.5,
        "limits": {"flops_per_s": 2e11, "bytes_per_s": 5e10},
        "load": 0.5,
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "host": {"processor": "a processor", "threads": 2, "openblas_num_threads": "1"},
        "versions": {"python": "3.11.0", "jax": "0.10.2"},
        "commit": "0123456789abcdef",
        "dirty": False,
        **fields,
        "case": fields.get("case", SQUARE).describe(),
    }

    check_record(record)
    return record


def make_run(factor=1.0, ours=1.0, seed=None, error=1e-5):
    """Return the records of two cases, with 10 % of noise where there is a seed."""
    rng = np.random.default_rng(seed)

    def draw(milliseconds):
        noise = rng.uniform(0.9, 1.1, 7) if seed is not None else np.ones(7)
        return (factor * milliseconds * noise).tolist()

    records = []
    for case, base in ((SQUARE, 10.0), (SQUARE._replace(rank=64, layers=4), 30.0)):
        for passes, part in (("", 1.0), (" 8 passes", 0.4), (" 16 passes", 0.7)):
            records.append(
                make_record(
                    f"jlora krylov{passes}",
                    draw(ours * part * base),
                    case=case,
                    compile_ms=250.0,
                    peak_bytes=3 * 2**20,
                    errors={"excess error": error / part**4},
                )
            )
        for name, (part, excess) in PEERS.items():
            records.append(
                make_record(
                    name, draw(part * base), case=case, errors={"excess error": excess}
                )
            )
    product = {
        "operation": "matrix product",
        "suite": "limits",
        "role": "limit",
        "bytes": None,
        "floor_ms": None,
        "limits": {},
        "errors": {"relative error": 1e-7},
    }
    records.append(make_record("jnp.matmul", draw(50.0), **product))
    return records


def make_readme_run(**fields):
    """Return the records of the two sides of each row of the README."""
    peers = ("scipy svds", "torch addmm_", "peft pissa_niter_16")
    records = []

    for row, peer in zip(ROWS, peers, strict=True):
        suite, operation, name = row.problem
        for implementation, milliseconds in ((row.ours, 10.0), (peer, 40.0)):
            record = make_record(
                implementation,
                [milliseconds] * 3,
                suite=suite,
                operation=operation,
                **fields,
            )
            record["case"]["name"] = name
            records.append(record)
    return records


def make_gaps():
    """Return records that were not measured."""
    gone = {"status": "skipped", "reason": "cupy is not installed"}
    broken = {"status": "failed", "reason": "RuntimeError: out of memory"}
    return [make_record("cupy svds", **gone), make_record("fbpca", **broken)]


def test_spread_is_median_and_quartiles():
    assert find_spread([5, 1, 2, 4, 3]) == (3, 2, 4, 5)


def test_ratio_is_taken_round_by_round():
    # A burst of load in the third round hits both sides.
    ours = make_record(times_ms=[1.0, 1.5, 9.0, 2.0])
    peer = make_record("peer", [2.0, 3.0, 18.0, 4.0, 0.1])
    assert ratio_of_medians(ours, peer) == (0.5, 0.5, 0.5, 4)
    # Rounds are matched by their number, not their position: 1.5 / 2, 9 / 3, 2 / 18.
    assert ratio_of_medians(ours, {**peer, "rounds": [1, 2, 3, 4, 5]}).ratio == 0.75


@pytest.mark.parametrize(
    "fields",
    [{"time": "2026-01-03T00:00:00+00:00"}, {"case": SQUARE._replace(rank=64)}],
    ids=["another run", "another case"],
)
def test_ratio_of_two_runs_is_the_ratio_of_the_medians(fields):
    ours, peer = (
        make_record(times_ms=[1, 2, 3, 4, 5]),
        make_record("peer", [12, 4, 6], **fields),
    )
    assert ratio_of_medians(ours, peer) == (3 / 6, 2 / 9, 4 / 5, 3)


def test_too_few_shared_rounds_are_not_compared_one_by_one():
    ours, peer = (
        make_record(times_ms=[90.0, 1.0, 1.0, 1.0]),
        make_record("peer", [10.0]),
    )
    assert ratio_of_medians(ours, peer).ratio == 0.1


@pytest.mark.parametrize(
    ("error", "other", "exact"),
    [
        (1e-3, 1.04e-3, True),
        (1e-3, 1.06e-3, False),
        (1e-9, 9e-7, True),
        (1e-9, 2e-6, False),
        (1e-3, float("nan"), False),
    ],
)
def test_is_as_exact(error, other, exact):
    ours = make_record(errors={"excess error": error})
    assert (
        is_as_exact(make_record("peer", errors={"excess error": other}), ours) == exact
    )


def test_fastest_peer_is_sought_overall_and_among_the_exact():
    records = [*make_run(), *make_gaps()]
    ours = records[0]
    overall = find_fastest_peer(ours, records, as_exact=False)
    exact = find_fastest_peer(ours, records, as_exact=True)
    assert overall["implementation"] == "torch.svd_lowrank niter 4"
    assert exact["implementation"] == "scipy svds"
    assert find_fastest_peer(ours, records[:3], as_exact=False) is None


def test_chosen_cases_differ():
    cases = [
        SQUARE,
        SQUARE._replace(model="bert-base", layer="mlp up"),
        SQUARE._replace(rank=64, spectrum="flat"),
    ]
    chosen = choose_cases([make_record(case=case) for case in [*cases, *cases]], 2)
    assert [case["name"] for case in chosen] == [cases[0].name, cases[2].name]
    assert len(choose_cases([make_record(case=case) for case in cases], 9)) == 3


def test_report_names_every_record_and_every_reason(tmp_path):
    records = [*make_run(), *make_gaps()]
    paths = write_report(records, tmp_path / "report")
    text = paths[0].read_text()
    assert paths[0].name == "report.md"

    for record in records:
        assert record["implementation"] in text
        assert record["case"]["name"] in text
        assert record["reason"] is None or record["reason"] in text
        assert record["setting"] in text

    for word in ("a processor", "2 threads", "01234567", "2026-01-02", "jax 0.10.2"):
        assert word in text
    assert "Warning" not in text


def test_report_holds_the_right_numbers(tmp_path):
    text = write_report(make_run(), tmp_path)[0].read_text()
    (line,) = [
        line for line in text.splitlines() if line.startswith("| jlora krylov | 10 ")
    ]

    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == [
        "jlora krylov",
        "10 (10–10)",
        "0.25 (0.25–0.25) of scipy svds",
        "1.25 (1.25–1.25) of torch.svd_lowrank niter 4",
        "20",
        "1.0e-05",
        "250",
        "3",
    ]


def test_report_says_where_no_peer_is_as_exact(tmp_path):
    records = [make_record(), make_record("peer", errors={"excess error": 1.0})]
    assert "no peer as exact" in write_report(records, tmp_path)[0].read_text()


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"commit": "fedcba98"}, "several commits"),
        ({"load": 2.6}, "1 of 8 records were measured beside other work"),
        ({"others_cores": 0.7}, "1 of 8 records were measured beside other work"),
        ({"dirty": True}, "not committed"),
    ],
    ids=["commits", "load", "others", "dirty"],
)
def test_report_warns(tmp_path, fields, warning):
    records = [*make_run()[:7], make_record(case=SQUARE._replace(rank=32), **fields)]
    text = write_report(records, tmp_path)[0].read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("**Warning")]
    assert warning in line


def test_report_marks_ratios_across_runs(tmp_path):
    records = [make_record(), make_record("peer", time="2026-01-01T00:00:00+00:00")]
    text = write_report(records, tmp_path)[0].read_text()
    assert "1 (1–1)† of peer" in text
    assert "† of two runs" in text


def test_report_holds_the_main_table(tmp_path):
    text = write_report(make_run(), tmp_path)[0].read_text()
    assert make_main_table(make_run()) in text
    assert "‡" not in text


def test_report_marks_cases_that_were_disturbed(tmp_path):
    records = make_run()
    for record in records[:7]:
        record["others_cores"] = 0.9
    text = write_report(records, tmp_path)[0].read_text()
    assert f"| {SQUARE.name}‡ |" in text
    assert text.count("‡") == 2


def test_main_table_compares_the_default_with_each_peer():
    table = make_main_table([*make_run(), *make_gaps()])
    lines = table.splitlines()
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert len(lines) == 4
    assert row[0] == SQUARE.name
    assert row[1] == "10, 1.0e-05"
    assert "0.25 of scipy svds" in row
    assert "8, 2.0e-03" in row


def test_readme_block_is_replaced_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "# A\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\nlast\n"
    )
    block = make_readme_block(make_readme_run())
    for _ in range(2):
        update_readme(path, block)
        assert path.read_text() == (
            f"# A\n<!-- benchmarks:begin -->\n{block.strip()}\n<!-- benchmarks:end "
            "-->\nlast\n"
        )


def list_readme_rows(block):
    """Return the cells of the table of a block, its header left out."""
    lines = [line for line in block.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_readme_block_is_short():
    block = make_readme_block([*make_run(), *make_readme_run()])
    rows = list_readme_rows(block)
    assert [row[1:] for row in rows] == [
        ["10, 1.0e-05", "scipy svds: 40, 1.0e-05", "0.25"],
        ["10, 1.0e-05", "torch addmm_: 40, 1.0e-05", "0.25"],
        ["10, 1.0e-05", "peft pissa_niter_16: 40, 1.0e-05", "0.25"],
    ]

    assert block.startswith("Measured on cpu, a processor, 2 threads; commit 01234567,")
    assert block.count("](benchmarks/results/cpu/report/frontier.png)") == 1
    assert "](benchmarks/results/cpu/report/report.md)" in block
    assert len(block.splitlines()) < 20
    assert "‡" not in block
    assert "†" not in block


def test_readme_block_leaves_out_rows_without_records():
    first, peer, *others = make_readme_run()
    assert len(list_readme_rows(make_readme_block([first, *others]))) == 2
    # The first row has only an inexact peer.
    inexact = {**peer, "errors": {"excess error": 1.0}}
    assert len(list_readme_rows(make_readme_block([first, inexact, *others]))) == 2
    assert len(list_readme_rows(make_readme_block([first, peer]))) == 1
    with pytest.raises(ValueError, match="must hold both sides of a row"):
        make_readme_block(make_run())


def test_readme_block_marks_disturbed_rows_and_two_runs():
    records = make_readme_run()
    records[0]["others_cores"] = 0.9
    records[3]["time"] = "2026-01-01T00:00:00+00:00"
    block = make_readme_block(records)
    rows = list_readme_rows(block)
    assert [row[0].endswith("‡") for row in rows] == [True, False, False]
    assert [row[3] for row in rows] == ["0.25", "0.25†", "0.25"]
    assert block.count("‡") == 2
    assert block.count("†") == 2


@pytest.mark.parametrize(
    "text",
    [
        "# A\n",
        "<!-- benchmarks:begin -->\n",
        "<!-- benchmarks:end -->\n<!-- benchmarks:begin -->\n",
    ],
    ids=["none", "one", "reversed"],
)
def test_readme_without_markers_is_refused(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"README.md must hold the line `<!-- benchmarks:begin"
    ):
        update_readme(path, "block")
    assert path.read_text() == text


def test_plots_are_written(tmp_path):
    if not can_draw():
        pytest.skip("matplotlib is not installed")

    sizes = [
        Case("bert-base", layer, 16, tokens=tokens)
        for layer in ("attention", "mlp up")
        for tokens in (64, 128)
    ]
    layers = [
        make_record(name, case=case, operation="lora layer")
        for case in sizes
        for name in ("jlora apply_factors", "torch LoRA")
    ]
    ranks = [make_record(case=SQUARE._replace(rank=rank)) for rank in (16, 64)]
    batches = [make_record(case=SQUARE._replace(layers=layers)) for layers in (4, 8)]

    paths = draw_plots([*make_run(), *layers, *ranks, *batches, *make_gaps()], tmp_path)
    names = {path.name for path in paths.values()}
    against = {
        f"time-against-{varied}.png" for varied in ("size", "rank", "batch", "tokens")
    }
    assert names == against | {"frontier.png", "roofline.png", "memory.png"}

    for path in paths.values():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5000


def test_plots_of_nothing_are_not_written(tmp_path):
    if not can_draw():
        pytest.skip("matplotlib is not installed")
    assert draw_plots(make_gaps(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_report_without_matplotlib_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.report.tables.can_draw", lambda: False)
    (path,) = write_report(make_run(), tmp_path)
    assert "no plots: matplotlib is not installed" in path.read_text()


def test_targets_leave_none_out_and_name_missing_records():
    square = Case("llama-3.2-1b", "attention", 64)
    whole = make_record(
        "benchmarks",
        [2e5],
        suite="package",
        operation="all suites",
        errors={},
        case=square,
    )
    whole["case"] = {**whole["case"], "name": "quick"}
    records = [
        make_record(case=square),
        make_record("jnp.linalg.svd", [10.0] * 3, case=square),
    ]

    lines = evaluate_targets([whole, *records])
    assert len(lines) == len(list_targets())
    assert "part 2, run --quick of everything, seconds: 200 (at most 360) met" in lines
    assert (
        "part 3, time over jnp.linalg.svd at 2048x2048: 0.2 (at most 0.05) missed"
        in lines
    )

    (line,) = (
        line
        for line in lines
        if line.startswith("part 3, excess error, default, worst")
    )
    found = [name for name in SVD_CASES if "exponential" not in name]
    missing = f"{len(found) - 1} of {len(found)} cases have no record"
    assert line.endswith(f"1e-05 (at most 0.0001) missed; {missing}")
    assert (
        "part 4, allocate_ranks on 224 layers, ms: no record (at most 50) missed"
        in lines
    )


def list_verdicts(rows):
    return {(row.key[2], row.key[3]): row.verdict for row in rows}


@pytest.mark.parametrize("seed", range(10))
def test_compare_is_quiet_on_noise(seed):
    rows, regressions = compare_records(make_run(seed=seed), make_run(seed=100 + seed))
    assert not regressions
    assert set(list_verdicts(rows).values()) == {"unchanged"}
    assert "no regression of jlora" in format_comparison(rows)


@pytest.mark.parametrize("seed", range(10))
def test_compare_catches_half_the_speed(seed):
    rows, regressions = compare_records(
        make_run(seed=seed), make_run(seed=100 + seed, ours=2.0)
    )

    ours = [row for row in rows if row.role == "jlora"]
    assert {row.verdict for row in ours} == {"slower"}
    assert regressions == ours
    assert f"{SQUARE.name}: jlora krylov 8 passes: slower" in format_comparison(rows)
    rows, regressions = compare_records(
        make_run(seed=seed, ours=2.0), make_run(seed=100 + seed)
    )
    assert {row.verdict for row in rows if row.role == "jlora"} == {"faster"}
    assert not regressions


@pytest.mark.parametrize("seed", range(10))
def test_compare_does_not_call_a_slower_machine_a_regression(seed):
    rows, regressions = compare_records(
        make_run(seed=seed), make_run(1.5, seed=100 + seed)
    )
    assert not regressions
    assert rows[0].drift.factor == pytest.approx(1.5, rel=0.1)
    assert rows[0].ratio == pytest.approx(1.5, rel=0.2)
    assert rows[0].corrected == pytest.approx(1.0, rel=0.2)

    # A slower machine does not hide a slower function either.
    _, regressions = compare_records(
        make_run(seed=seed), make_run(1.5, 2.0, seed=100 + seed)
    )
    assert len(regressions) == 6


def test_compare_trusts_its_peers_on_how_noisy_two_runs_are():
    before, after = make_run(seed=1), make_run(seed=2, ours=1.7)
    assert len(compare_records(before, after)[1]) == 6

    rng = np.random.default_rng(0)
    for record in after:
        if record["role"] != "jlora":  # starved, each in its own way
            record["times_ms"] = (
                np.exp(rng.normal(0, 0.8)) * np.array(record["times_ms"])
            ).tolist()
    rows, regressions = compare_records(before, after)
    assert not regressions
    assert "warning: too noisy to tell half the speed in 6 of 6" in format_comparison(
        rows
    )


def test_compare_prefers_peers_compiled_like_jlora():
    # Another process starves the thread pools of the other peers, and slows compiled
    # programs by 30 %.
    before, after = make_run(seed=1), make_run(1.3, 2.0, seed=2)
    for record in [*before, *after]:
        record["compile_ms"] = (
            None if record["implementation"].startswith(("to", "sc")) else 1.0
        )
    for record in after:
        if record["compile_ms"] is None:
            record["times_ms"] = [50 * time for time in record["times_ms"]]
    rows, regressions = compare_records(before, after)
    assert rows[0].drift.factor == pytest.approx(1.3, rel=0.1)
    assert len(regressions) == 6


@pytest.mark.parametrize(
    ("others", "factor", "num_slower"),
    [(0.2, 1.5, 6), (0.9, 1.5, 0), (0.9, 2.5, 6), (1.9, 2.5, 6), (5.0, 2.5, 0)],
)
def test_compare_allows_for_busy_cores(others, factor, num_slower):
    before, after = make_run(seed=1), make_run(seed=2, ours=factor)
    for record in after:
        record["others_cores"] = others
    assert len(compare_records(before, after)[1]) == num_slower


def test_compare_takes_the_drift_from_quiet_groups():
    before, after = make_run(seed=1), make_run(seed=2, ours=2.0)
    for record in after:
        if record["role"] != "limit" and record["case"]["name"] != SQUARE.name:
            record["others_cores"] = 1.0
            record["times_ms"] = [
                2.0 * milliseconds for milliseconds in record["times_ms"]
            ]
    rows, regressions = compare_records(before, after)
    assert rows[0].drift.factor == pytest.approx(1.0, rel=0.1)
    assert {row.key[2] for row in regressions} >= {SQUARE.name}


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(1.5e-3, "unchanged"), (2.5e-3, "less exact"), (float("nan"), "less exact")],
)
def test_compare_catches_an_error_that_grows(error, verdict):
    before, after = (
        [make_record(errors={"excess error": value})] for value in (1e-3, error)
    )
    rows, regressions = compare_records(before, after)
    assert rows[0].verdict == verdict
    assert len(regressions) == (verdict == "less exact")


def test_compare_ignores_the_growth_of_rounding():
    before, after = (
        [make_record(errors={"excess error": value})] for value in (1e-9, 9e-6)
    )
    assert compare_records(before, after)[0][0].verdict == "unchanged"


def test_compare_lists_records_of_only_one_side():
    gone, new = make_record("jlora old"), make_record("jlora new")
    skipped, failed = make_gaps()
    broken = make_record("jlora subspace", status="failed", reason="ValueError: no")
    before = [
        gone,
        skipped,
        make_record(),
        make_record("fbpca"),
        make_record("jlora subspace"),
    ]

    rows, regressions = compare_records(
        before, [new, skipped, make_record(), failed, broken]
    )

    verdicts = {row.key[3]: row.verdict for row in rows}
    assert verdicts == {
        "jlora old": "only in A",
        "jlora new": "only in B",
        "cupy svds": "skipped",
        "jlora krylov": "unchanged",
        "fbpca": "failed in B",
        "jlora subspace": "failed in B",
    }
    assert [row.key[3] for row in regressions] == ["jlora subspace"]

    text = format_comparison(rows)
    assert all(
        word in text for word in (*verdicts, "cupy is not installed", "ValueError: no")
    )
    assert format_comparison([]) == "no records"


def test_compare_refuses_two_devices():
    other = {"platform": "gpu", "kind": "H200", "count": 1}
    with pytest.raises(ValueError, match="must be of one device"):
        compare_records([make_record()], [make_record(device=other)])


def sleep_for(milliseconds, result):
    """Sleep, and return a result: a function of a known time."""
    time.sleep(1e-3 * milliseconds)
    return result


def measure_sleepers(ours_ms):
    """Return the records of one real run: jlora and a peer that never changes."""

    def prepare(milliseconds, value):
        return Prepared(
            functools.partial(sleep_for, milliseconds, value), lambda result: result
        )

    contenders = (
        Contender("jlora sleeper", functools.partial(prepare, ours_ms), "jlora"),
        Contender("peer", functools.partial(prepare, 5)),
    )
    group = Group(
        "test",
        "sleep",
        SQUARE,
        lambda: (zlib.crc32(b"value"),),
        contenders,
        lambda inputs, result: {"difference": result - inputs[0]},
    )
    return measure_group(group, Level("quick", 7, 1.0), Limits({}))


def test_compare_tells_a_slowed_function_in_real_runs():
    before, again, slowed = (measure_sleepers(ours_ms) for ours_ms in (5, 5, 20))
    rows, regressions = compare_records(before, again)
    assert [row.verdict for row in rows if row.role == "jlora"] == ["unchanged"]
    rows, regressions = compare_records(before, slowed)
    assert [row.key[3] for row in regressions] == ["jlora sleeper"]
    assert regressions[0].corrected == pytest.approx(4, rel=0.3)
