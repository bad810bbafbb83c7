"""Tables of the tasks, as Markdown: each task in full, and all tasks at a glance."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.report.markdown import NONE as NO_VALUE
from benchmarks.report.markdown import format_number, make_table
from benchmarks.report.statistics import describe_commits, describe_machine
from benchmarks.tasks.methods import LORA, NONE, V_ONLY
from benchmarks.tasks.results import (
    Results,
    compute_mean,
    compute_spread,
    find_metric,
    split_results,
)
from benchmarks.tasks.task import NEW, OLD

_GUIDE = """\
Each method has the learning rate with the lowest validation error, of a grid in steps
of √10 that reaches past the best rate on both sides. Values are means ± standard
deviations over the seeds, on test data that chose nothing. The seeds draw the factors
and the batches. The time of a step is the wall-clock time of a run over its steps."""


def make_task_report(results: Results) -> str:
    """Return the text of the report: one section for each task."""
    lines = [
        f"# Tasks on {describe_machine(results)}",
        f"Commit {describe_commits(results)}.",
        _GUIDE,
    ]
    for task in list_tasks(results):
        members = [each for each in results if each["task"] == task]
        first = members[0]
        lines += [
            f"## {task}",
            f"{first['model']}; {first['shift']}; rank {first['rank']}, "
            f"{first['num_steps']} steps.",
            _make_task_table(members),
        ]
    return "\n\n".join(lines) + "\n"


def make_overview(results: Results) -> str:
    """Return three tables of all tasks: the new domain, the old one, and the cost.

    Two more compare quantised with float bases, on the tasks where both ran.
    """
    on_float, quantized = split_results(results)
    texts = []
    if on_float:
        texts += _make_domain_tables(
            on_float, "New domain", "Old domain, after training"
        )
        cost = _make_table_of_tasks(on_float, list_tasks(on_float), _format_cost)
        texts += ["**Trained numbers, and ms per step**", cost]
    if quantized:
        texts += _make_domain_tables(
            _list_peers(on_float, list_tasks(quantized)) + list(quantized),
            "Quantised bases, new domain",
            "Quantised bases, old domain after training",
        )
    return "\n\n".join(texts)


def list_tasks(results: Results) -> list[str]:
    """Return the names of the tasks, in order."""
    return list(dict.fromkeys(each["task"] for each in results))


def format_value(metric: Mapping[str, Any]) -> str:
    """Return mean ± spread of a metric, with the digits that the spread leaves."""
    mean, spread = compute_mean(metric), compute_spread(metric)
    if len(metric["values"]) == 1:
        return format_number(mean)
    decimals = int(np.clip(1 - np.floor(np.log10(max(spread, 1e-4))), 0, 4))
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"


def _make_domain_tables(results: Results, new: str, old: str) -> list[str]:
    """Return the table of the new and of the old domain, each after its title."""
    texts = []
    for title, domain in ((new, NEW), (old, OLD)):
        header = _name_metrics(results, domain)
        table = _make_table_of_tasks(results, header, _pick_metric(domain))
        texts += [f"**{title}**", table]
    return texts


def _list_peers(on_float: Results, tasks: list[str]) -> list[Mapping[str, Any]]:
    """Return the results that the ones on quantised bases are compared with."""
    peers = [each for each in on_float if each["method"] in (NONE, V_ONLY, LORA)]
    return [each for each in peers if each["task"] in tasks]


def _make_table_of_tasks(
    results: Results, header: list[str], pick: Callable[[Mapping[str, Any]], str]
) -> str:
    """Return a table with a row for each method and a column for each task."""
    tasks = list_tasks(results)
    rows = []
    for method in dict.fromkeys(each["method"] for each in results):
        cells = [_find_cell(results, task, method, pick) for task in tasks]
        rows.append([method, *cells])
    return make_table(["", *header], rows)


def _make_task_table(members: Results) -> str:
    names = [metric["name"] for metric in members[0]["metrics"]]
    header = ["", *names, "rate", "trained", "optimiser", "ms per step"]
    rows = []
    for result in members:
        metrics = [format_value(find_metric(result, name)) for name in names]
        rate = NO_VALUE if result["rate"] is None else f"{result['rate']:.1e}"
        trained, size = (
            NO_VALUE if result[name] is None else f"{result[name]:,}"
            for name in ("num_trained", "optimizer_bytes")
        )
        cells = [rate, trained, size, _format_time(result)]
        rows.append([result["method"], *metrics, *cells])
    return make_table(header, rows)


def _name_metrics(results: Results, domain: str) -> list[str]:
    """Return "task: metric" for the first metric of a domain of each task."""
    names = []
    for task in list_tasks(results):
        result = next(each for each in results if each["task"] == task)
        metric = _find_first(result, domain)
        arrow = "↑" if metric["is_better_higher"] else "↓"
        names.append(f"{task}: {metric['name']} {arrow}")
    return names


def _find_first(result: Mapping[str, Any], domain: str) -> dict[str, Any]:
    return next(each for each in result["metrics"] if each["domain"] == domain)


def _pick_metric(domain: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: format_value(_find_first(result, domain))


def _format_cost(result: Mapping[str, Any]) -> str:
    if result["num_trained"] is None:
        return NO_VALUE
    return f"{result['num_trained']:,}; {_format_time(result)}"


def _format_time(result: Mapping[str, Any]) -> str:
    times = result["step_ms"]
    return format_number(float(np.median(times))) if times else NO_VALUE


def _find_cell(
    results: Results, task: str, method: str, pick: Callable[[Mapping[str, Any]], str]
) -> str:
    for result in results:
        if (result["task"], result["method"]) == (task, method):
            return pick(result)
    return NO_VALUE
