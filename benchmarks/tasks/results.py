"""Results of the tasks: one JSON line for each method on each task."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jlora
from benchmarks.run.environment import describe_environment
from benchmarks.run.outcomes import get_start_time
from benchmarks.tasks.methods import is_quantized
from benchmarks.tasks.task import Task

Results = Sequence[Mapping[str, Any]]  # of `make_result`, or read from a file


def make_result(
    task: Task,
    method: str,
    level: str,
    metrics: Sequence[Mapping[str, float]],
    seconds: float,
    *,
    rate: float | None = None,
    errors: Mapping[float, float] | None = None,
    step_ms: Sequence[float] = (),
    cost: jlora.training.TrainingCost | None = None,
    others_cores: float | None = None,
) -> dict[str, Any]:
    """Return the result of one method on one task.

    Args:
        task: the task.
        method: name of the method.
        level: "quick" or "full".
        metrics: {metric name: value} of each seed.
        seconds: time that all of it took, with the search for the learning rate.
        rate: chosen learning rate.
        errors: {rate: validation error}, inf where training diverged.
        step_ms: time of a step, of each run after the first.
        cost: trained elements and bytes of the optimiser.
        others_cores: cores that other processes kept busy.
    """
    return {
        "time": get_start_time(),
        "level": level,
        "task": task.name,
        "model": task.model,
        "shift": task.shift,
        "method": method,
        "rank": task.rank,
        "num_steps": task.num_steps,
        "metrics": [
            {**metric._asdict(), "values": [each[metric.name] for each in metrics]}
            for metric in task.metrics
        ],
        "rate": rate,
        "errors": [[each, error] for each, error in (errors or {}).items()],
        "step_ms": [round(each, 4) for each in step_ms],
        "num_trained": cost and cost.num_trained,
        "optimizer_bytes": cost and cost.optimizer_bytes,
        "seconds": round(seconds, 2),
        "others_cores": others_cores,
        **describe_environment(),
    }


def append_result(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Append a result to a file; it is on the disk when this returns."""
    line = json.dumps(_replace_infinity(result), ensure_ascii=False, allow_nan=False)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_newest(folder: pathlib.Path, level: str = "full") -> list[dict[str, Any]]:
    """Return the newest result of each method on each task, in the order of the runs.

    Args:
        folder: of the files of results.
        level: "quick" or "full".
    """
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            result = json.loads(line)
            if result["level"] == level:
                newest[result["task"], result["method"]] = result
    return list(newest.values())


def split_results(results: Results) -> tuple[Results, Results]:
    """Return the results on float bases and the ones on quantised bases."""
    on_float = [each for each in results if not is_quantized(each["method"])]
    return on_float, [each for each in results if is_quantized(each["method"])]


def find_metric(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one metric of a result."""
    return next(each for each in result["metrics"] if each["name"] == name)


def compute_mean(metric: Mapping[str, Any]) -> float:
    """Return the mean over the seeds."""
    return float(np.mean(metric["values"]))


def compute_spread(metric: Mapping[str, Any]) -> float:
    """Return the standard deviation over the seeds; 0 for one seed."""
    values = metric["values"]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _replace_infinity(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result with None as the error of each rate that diverged."""
    errors = [
        [rate, error if np.isfinite(error) else None]
        for rate, error in result["errors"]
    ]
    return {**result, "errors": errors}
