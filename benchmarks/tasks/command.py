"""The command `python -m benchmarks tasks`, and the report of its results."""

import argparse
import pathlib
import time
from typing import Any

from benchmarks.plots.style import can_draw
from benchmarks.run.environment import RESULTS, name_device_folder
from benchmarks.run.outcomes import name_output
from benchmarks.tasks.figure import draw_tasks
from benchmarks.tasks.results import append_result, read_newest, split_results
from benchmarks.tasks.running import QUICK, TABLE, choose_methods, run_tasks
from benchmarks.tasks.tables import format_value, make_overview, make_task_report
from benchmarks.tasks.targets import evaluate_targets

FOLDER = "tasks"  # of the results, inside the folder of a device
DOCUMENT = RESULTS.parent.parent / "docs" / "choosing.md"
BEGIN, END = "<!-- tasks:begin -->", "<!-- tasks:end -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help=f"some of {', '.join(TABLE.sizes)}; default: all",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three methods, one rate, one seed: minutes; default: up to an hour",
    )
    parser.add_argument(
        "--methods",
        metavar="REGEX",
        help="only methods whose name matches; NF4: those on quantised bases; "
        "default: those on float bases",
    )
    parser.add_argument("--out", metavar="FILE", help="append the results to this file")


def run_command(arguments: argparse.Namespace) -> int:
    """Train every method on every task, and print and write the results."""
    level = QUICK if arguments.quick else TABLE
    names = arguments.tasks or list(level.sizes)
    for name in names:
        if name not in level.sizes:
            known = ", ".join(level.sizes)
            raise ValueError(f"`TASK` must be one of {known}, got {name}. Choose one.")
    if not choose_methods(level, arguments.methods):
        known = ", ".join(choose_methods(level, ""))
        raise ValueError(
            f"`--methods` must match one of {known}, got {arguments.methods!r}. "
            "Change it."
        )

    path = pathlib.Path(arguments.out) if arguments.out else _name_output(level.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {path}")
    start = time.perf_counter()

    def emit(result: dict[str, Any]) -> None:
        append_result(path, result)
        _print_result(result)

    run_tasks(level, names, emit, arguments.methods)
    print(f"took {time.perf_counter() - start:.0f} s")
    return 0


def write_task_report(device: pathlib.Path) -> list[pathlib.Path]:
    """Write tasks.md and tasks.png of a device; return the paths, [] without results.

    Args:
        device: folder of the results of a kind of device.
    """
    results = read_newest(device / FOLDER)
    if not results:
        return []
    folder = device / "report"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tasks.md"
    text = make_task_report(results)
    on_float, _ = split_results(results)
    if on_float and can_draw():
        draw_tasks(on_float, folder / "tasks.png")
        text += "\n![New domain against old domain](tasks.png)\n"
    path.write_text(text, encoding="utf-8")
    return [path]


def update_document(device: pathlib.Path) -> list[pathlib.Path]:
    """Write the tables and the picture into docs/choosing.md; return the paths.

    Args:
        device: folder of the results of a kind of device.
    """
    results = read_newest(device / FOLDER)
    if not results:
        return []
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    block = f"{BEGIN}\n{make_overview(results)}\n{END}"
    DOCUMENT.write_text(f"{before}{block}{after}", encoding="utf-8")

    paths = [DOCUMENT]
    on_float, _ = split_results(results)
    if on_float and can_draw():
        paths.append(DOCUMENT.with_name("tasks.png"))
        draw_tasks(on_float, paths[-1])
    return paths


def evaluate_task_targets(device: pathlib.Path) -> list[str]:
    """Return one line for each target of the tasks, met or missed by a device."""
    levels = QUICK.name, TABLE.name
    results = {level: read_newest(device / FOLDER, level) for level in levels}
    return evaluate_targets(results)


def _name_output(level: str) -> pathlib.Path:
    return RESULTS / name_device_folder() / FOLDER / name_output(level)


def _print_result(result: dict[str, Any]) -> None:
    metrics = ", ".join(
        f"{each['name']} {format_value(each)}" for each in result["metrics"]
    )
    rate = "" if result["rate"] is None else f"  rate {result['rate']:.1e}"
    print(
        f"{result['task']}, {result['method']}: {metrics}{rate}  "
        f"({result['seconds']:.0f} s)",
        flush=True,
    )
