"""`python -m benchmarks`: run suites, write reports, compare runs, print targets."""

import os

# Set before JAX is imported; tests/conftest.py says why.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import pathlib
import re
import statistics
import sys
import time

import jax

from benchmarks.report.statistics import find_error
from benchmarks.run.contenders import FULL, QUICK
from benchmarks.run.environment import (
    RESULTS,
    count_threads,
    measure_load,
    name_device_folder,
)
from benchmarks.run.harness import measure_group
from benchmarks.run.limits import measure_limits
from benchmarks.run.outcomes import make_timed_record, name_output
from benchmarks.run.records import append_records, read_newest, read_records
from benchmarks.suites import SUITES, list_suite
from benchmarks.suites.package import make_whole_run
from benchmarks.tasks.command import add_arguments as add_task_arguments
from benchmarks.tasks.command import (
    evaluate_task_targets,
    run_command,
    update_document,
    write_task_report,
)


def main(argv=None):
    """Run one command and return its exit code: 0 done, 1 regression, 2 refused."""
    arguments = _build_parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def run_suites(arguments):
    """Measure suites, and write the records of each group at once."""
    level = FULL if arguments.full else QUICK
    names = arguments.suites or SUITES
    if arguments.list:
        return _print_groups(names, level, arguments.match)

    path = pathlib.Path(arguments.out) if arguments.out else _name_output(level.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    _warn_if_busy()

    def emit(records):
        append_records(path, records)
        for record in records:
            _print_record(record)

    print(f"writing {path}")
    start = time.perf_counter()
    limits = measure_limits(level, emit)
    for name in names:
        _run_suite(name, level, limits, arguments.match, emit)

    # The time of a complete run is a result of its own.
    if set(names) == set(SUITES) and arguments.match is None:
        took_ms = 1e3 * (time.perf_counter() - start)
        emit([make_timed_record(*make_whole_run(level.name), level, limits, [took_ms])])
    return 0


def run_tasks(arguments):
    """Train every way to adapt a model on every task, and write the results."""
    return run_command(arguments)


def write_reports(arguments):
    """Write the tables and plots of one kind of device, and on request the README."""
    from benchmarks.report.readme import make_readme_block, update_readme
    from benchmarks.report.tables import write_report

    folder = RESULTS / (arguments.device or name_device_folder())
    records = _read_device(folder)
    for path in write_report(records, folder / "report") + write_task_report(folder):
        print(f"wrote {path}")

    if arguments.docs:
        for path in update_document(folder):
            print(f"wrote {path}")
    if arguments.readme:
        update_readme(RESULTS.parent.parent / "README.md", make_readme_block(records))
        print("wrote README.md")
    return 0


def compare_files(arguments):
    """Compare two files of records; exit code 1 if jlora is slower or less exact."""
    from benchmarks.report.compare import compare_records, format_comparison

    before, after = (read_records(path) for path in (arguments.before, arguments.after))
    rows, regressions = compare_records(before, after)
    print(format_comparison(rows))
    return 1 if regressions else 0


def print_targets(arguments):
    """Print every target of the project, met or missed by the newest records."""
    from benchmarks.report.targets import evaluate_targets

    folder = RESULTS / (arguments.device or name_device_folder())
    lines = evaluate_targets(_read_device(folder))
    for line in [*lines, *evaluate_task_targets(folder)]:
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
    _add_run_arguments(run)

    tasks = add_command("tasks", run_tasks, "compare ways to adapt models")
    add_task_arguments(tasks)

    report = add_command("report", write_reports, "write the tables and plots")
    report.add_argument(
        "--readme", action="store_true", help="also write the block in README.md"
    )
    report.add_argument(
        "--docs", action="store_true", help="also write the tasks in docs/choosing.md"
    )

    compare = add_command("compare", compare_files, "compare two files of records")
    compare.add_argument("before", metavar="A")
    compare.add_argument("after", metavar="B")

    targets = add_command("targets", print_targets, "print each value and its target")
    for subparser in (report, targets):
        subparser.add_argument(
            "--device",
            help="folder under benchmarks/results; default: the one of this machine",
        )
    return parser


def _add_run_arguments(parser):
    parser.add_argument(
        "suites",
        nargs="*",
        metavar="SUITE",
        help=f"some of {', '.join(SUITES)}; default: all",
    )

    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="small cases, minutes (the default)"
    )
    level.add_argument(
        "--full", action="store_true", help="real model shapes, up to an hour"
    )

    parser.add_argument("--out", metavar="FILE", help="append the records to this file")
    parser.add_argument(
        "--match",
        metavar="REGEX",
        help='only problems whose name "operation, case" matches',
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="only list the problems and their contenders",
    )


def _print_groups(names, level, pattern):
    """Print one line for each group that would be measured."""
    for name in names:
        for group in _list_matching(name, level, pattern):
            count = len(group.contenders)
            print(f"{name}: {group.operation}, {group.case.name}, {count} contenders")
    return 0


def _run_suite(name, level, limits, pattern, emit):
    """Measure one suite and give each group's records to `emit`."""
    start = time.perf_counter()
    for group in _list_matching(name, level, pattern):
        print(f"{name}: {group.operation}, {group.case.name}")
        emit(measure_group(group, level, limits))
    print(f"{name} took {time.perf_counter() - start:.0f} s")


def _list_matching(name, level, pattern):
    """Return the groups of a suite; with a pattern, those whose name matches it."""
    groups = list_suite(name, level.name, jax.default_backend())
    if pattern is None:
        return groups
    return [
        group
        for group in groups
        if re.search(pattern, f"{group.operation}, {group.case.name}")
    ]


def _name_output(level):
    return RESULTS / name_device_folder() / name_output(level)


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
            f"warning: the load average is {load} on {threads} threads; "
            "times will be noisy"
        )


def _print_record(record):
    name = f"  {record['implementation']:34}"
    if record["status"] != "measured":
        print(f"{name} {record['status']}: {record['reason']}", flush=True)
        return

    times = record["times_ms"]
    median = statistics.median(times)
    extremes = f"({min(times):.2f}..{max(times):.2f})"
    floor = f"{median / record['floor_ms']:7.1f}× floor" if record["floor_ms"] else ""
    kind, value = find_error(record)
    error = "" if kind is None else f"{kind} {value:.2e}"
    print(f"{name} {median:10.2f} ms {extremes} {floor}  {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
