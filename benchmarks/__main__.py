"""`python -m benchmarks`: run suites, report, compare two records, print the bars."""

import os

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before JAX; why: see tests/conftest.py

import argparse
import pathlib
import re
import statistics
import sys
import time

import jax

from benchmarks.report.statistics import find_error
from benchmarks.run.environment import (
    RESULTS,
    count_threads,
    describe_environment,
    measure_load,
    name_device_folder,
)
from benchmarks.run.harness import (
    FULL,
    QUICK,
    make_timed_record,
    measure_group,
    start_of_run,
)
from benchmarks.run.limits import measure_limits
from benchmarks.run.records import append_records, read_newest, read_records
from benchmarks.suites import SUITES, list_suite
from benchmarks.suites.package import make_whole_run


def main(argv=None):
    """Run one command and return its exit code: 0 done, 1 regression, 2 refused."""
    arguments = _build_parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def run_suites(arguments):
    """Measure suites, and append each group's records to the file as soon as it is measured."""
    level = FULL if arguments.full else QUICK
    platform = jax.default_backend()
    names = arguments.suites or SUITES
    if arguments.list:
        for name in names:
            for group in _list_matching(name, level, platform, arguments.match):
                print(
                    f"{name}: {group.operation}, {group.case.name}, "
                    f"{len(group.contenders)} contenders"
                )
        return 0
    path = pathlib.Path(arguments.out) if arguments.out else _name_output(level)
    path.parent.mkdir(parents=True, exist_ok=True)
    _warn_if_busy()

    def emit(records):
        append_records(path, records)
        for record in records:
            _print_record(record)

    print(f"writing {path}")
    start_of_all = time.perf_counter()
    limits = measure_limits(level, emit)
    for name in names:
        start = time.perf_counter()
        for group in _list_matching(name, level, platform, arguments.match):
            print(f"{name}: {group.operation}, {group.case.name}")
            emit(measure_group(group, level, limits))
        print(f"{name} took {time.perf_counter() - start:.0f} s")
    if set(names) == set(SUITES) and arguments.match is None:
        took_ms = 1e3 * (time.perf_counter() - start_of_all)
        emit([make_timed_record(*make_whole_run(level.name), level, limits, [took_ms])])
    return 0


def write_reports(arguments):
    """Write the tables and plots of one kind of device, and the README's block if asked."""
    from benchmarks.report.tables import make_readme_block, update_readme, write_report

    folder = RESULTS / (arguments.device or name_device_folder())
    records = _read_device(folder)
    for path in write_report(records, folder / "report"):
        print(f"wrote {path}")
    if arguments.readme:
        update_readme(RESULTS.parent.parent / "README.md", make_readme_block(records))
        print("wrote README.md")
    return 0


def compare_files(arguments):
    """Compare two files of records; exit code 1 if one of jlora's got slower or less exact."""
    from benchmarks.report.compare import compare_records, format_comparison

    before, after = (read_records(path) for path in (arguments.before, arguments.after))
    rows, regressions = compare_records(before, after)
    print(format_comparison(rows))
    return 1 if regressions else 0


def print_bars(arguments):
    """Print every figure that was asked for, from the newest records of one kind of device."""
    from benchmarks.report.targets import evaluate_bars

    folder = RESULTS / (arguments.device or name_device_folder())
    for line in evaluate_bars(_read_device(folder)):
        print(line)
    return 0


def _build_parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name, command, help):
        subparser = commands.add_parser(name, help=help, description=command.__doc__)
        subparser.set_defaults(command=command)
        return subparser

    run = add_command("run", run_suites, "measure suites")
    run.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; all"
    )
    level = run.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="small cases, minutes (the default)"
    )
    level.add_argument(
        "--full", action="store_true", help="real model shapes, up to an hour"
    )
    run.add_argument("--out", metavar="FILE", help="append the records here")
    run.add_argument(
        "--match", metavar="REGEX", help="only problems whose name it is found in"
    )
    run.add_argument(
        "--list", action="store_true", help="only name what would be measured"
    )
    report = add_command(
        "report", write_reports, "make tables and plots of the newest records"
    )
    report.add_argument(
        "--readme", action="store_true", help="also write the README's block"
    )
    compare = add_command(
        "compare", compare_files, "tell what changed between two records"
    )
    compare.add_argument("before", metavar="A")
    compare.add_argument("after", metavar="B")
    bars = add_command("bars", print_bars, "print each figure against its bar")
    for subparser in (report, bars):
        subparser.add_argument(
            "--device", help="folder under benchmarks/results; this machine's"
        )
    return parser


def _list_matching(name, level, platform, pattern):
    groups = list_suite(name, level.name, platform)
    if pattern is None:
        return groups
    return [
        group
        for group in groups
        if re.search(pattern, f"{group.operation}, {group.case.name}")
    ]


def _name_output(level):
    stamp = start_of_run().replace("-", "").replace(":", "").split("+")[0]
    commit = describe_environment()["commit"][:8]
    return RESULTS / name_device_folder() / f"{stamp}-{commit}-{level.name}.jsonl"


def _read_device(folder):
    records = read_newest(folder)
    if not records:
        raise ValueError(
            f"{folder} must hold records, got none. Run `python -m benchmarks run`."
        )
    return records


def _warn_if_busy():
    load, threads = measure_load(), count_threads()
    if load > 0.5 * threads:
        print(
            f"warning: the load average is {load} on {threads} threads; times will be noisy"
        )


def _print_record(record):
    name = f"  {record['implementation']:34}"
    if record["status"] != "measured":
        print(f"{name} {record['status']}: {record['reason']}", flush=True)
        return
    times = record["times_ms"]
    median = statistics.median(times)
    floor = f"{median / record['floor_ms']:7.1f}× floor" if record["floor_ms"] else ""
    kind, value = find_error(record)
    error = "" if kind is None else f"{kind} {value:.2e}"
    print(
        f"{name} {median:10.2f} ms ({min(times):.2f}..{max(times):.2f}) "
        f"{floor}  {error}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
