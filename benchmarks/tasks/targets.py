"""Targets of the tasks: V only against LoRA, and the time of a run (part 10)."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.targets.evaluation import format_target
from benchmarks.report.targets.target import Target
from benchmarks.tasks.methods import LORA, V_ONLY
from benchmarks.tasks.results import compute_mean, compute_spread, split_results
from benchmarks.tasks.running import QUICK, TABLE

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # {level: results}


def evaluate_targets(results: Results) -> list[str]:
    """Return one line for each target, as the suites' targets have.

    Methods on quantised bases run on their own, so they do not count.
    """
    on_float = {level: split_results(found)[0] for level, found in results.items()}
    return [format_target(target, target.measure(on_float)) for target in TARGETS]


def count_as_good(results: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of tasks on which V only is within one spread of LoRA.

    The first metric of a task decides. The spread is the larger of the two methods'.
    None: a task misses one of them.
    """
    by_key = {(each["task"], each["method"]): each for each in results}
    tasks = list(dict.fromkeys(each["task"] for each in results))
    count = 0
    for task in tasks:
        pair = [by_key.get((task, method)) for method in (V_ONLY, LORA)]
        if None in pair:
            return None
        count += is_as_good(*(each["metrics"][0] for each in pair))
    return count if len(tasks) == len(TABLE.sizes) else None


def is_as_good(metric: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a metric is within one spread of another method's, or better."""
    sign = 1 if metric["is_better_higher"] else -1
    shortfall = sign * (compute_mean(other) - compute_mean(metric))
    return shortfall <= max(compute_spread(metric), compute_spread(other))


def _measure_seconds(level: str) -> Any:
    def measure(results: Results) -> float | None:
        found = results[level]
        return sum(each["seconds"] for each in found) if _is_one_run(found) else None

    return measure


def _is_one_run(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the results hold all tasks, and come from one start of the command."""
    tasks = {each["task"] for each in results}
    starts = {each["time"] for each in results}
    return len(starts) == 1 and len(tasks) == len(TABLE.sizes)


TARGETS = (
    Target(
        10,
        f"tasks on which V only is within one spread of LoRA, of {len(TABLE.sizes)}",
        4,
        lambda results: count_as_good(results[TABLE.name]),
        at_least=True,
    ),
    Target(10, "tasks --quick, seconds", 300, _measure_seconds(QUICK.name)),
    Target(10, "tasks, all of the table, seconds", 3600, _measure_seconds(TABLE.name)),
)
