"""Runs the tasks: tune each method, train it with several seeds, measure it."""

import importlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import jlora
from benchmarks.run.environment import count_others_cores, read_processor_seconds
from benchmarks.tasks.methods import (
    FULL,
    LORA,
    NONE,
    NONE_QUANTIZED,
    QLORA,
    V_ONLY,
    Method,
    adapt_params,
    list_methods,
    list_quantized_methods,
)
from benchmarks.tasks.results import make_result
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Trainer


class TaskSize(NamedTuple):
    """How long one task trains."""

    num_steps: int
    num_pretrain_steps: int | None = None  # None: the model is pretrained already


class Level(NamedTuple):
    """How thorough a run is."""

    name: str
    num_seeds: int
    num_rates: int  # of the first grid of learning rates
    methods: tuple[str, ...] | None  # None: all on float bases
    sizes: dict[str, TaskSize]  # {module: size}


QUICK = Level(
    "quick",
    1,
    1,
    (V_ONLY, LORA, FULL),
    {
        "topics": TaskSize(30),
        "answers": TaskSize(30),
        "translation": TaskSize(40, 300),
        "images": TaskSize(100, 300),
        "recommendation": TaskSize(200, 1500),
        "language": TaskSize(60, 200),
    },
)
TABLE = Level(
    "full",
    3,
    3,
    None,
    {
        "topics": TaskSize(60),
        "answers": TaskSize(60),
        "translation": TaskSize(120, 1000),
        "images": TaskSize(200, 800),
        "recommendation": TaskSize(300, 2000),
        "language": TaskSize(120, 450),
    },
)


def run_tasks(
    level: Level,
    names: list[str],
    emit: Callable[[dict[str, Any]], None],
    pattern: str | None = None,
) -> None:
    """Run tasks and give the result of each method to `emit` at once.

    Args:
        level: `QUICK` or `TABLE`.
        names: modules of the tasks, from `level.sizes`.
        emit: receives results of `make_result`.
        pattern: of the names of the methods, see `choose_methods`.
    """
    chosen = choose_methods(level, pattern)
    for name in names:
        start = time.perf_counter()
        module = importlib.import_module(f"benchmarks.tasks.{name}")
        sizes = [each for each in level.sizes[name] if each is not None]
        task = module.make_task(*sizes)
        for method in (NONE, NONE_QUANTIZED):
            if method in chosen:
                emit(measure_before(task, method, level, start))
                start = time.perf_counter()

        for method in (*list_methods(task.num_columns), *list_quantized_methods()):
            if method.name not in chosen:
                continue
            if method.needs_moments and task.measure_moments is None:
                print(
                    f"{task.name}, {method.name}: absent, no second moments of inputs"
                )
            else:
                emit(run_method(task, method, level))


def choose_methods(level: Level, pattern: str | None) -> list[str]:
    """Return the names of the methods to run.

    Args:
        level: `QUICK` or `TABLE`.
        pattern: regular expression, searched anywhere in a name. None: the methods of
            the level, which are on float bases.
    """
    on_float = [NONE, *(each.name for each in list_methods(num_columns=1))]
    if pattern is None:
        chosen = level.methods or on_float
        return [each for each in on_float if each == NONE or each in chosen]

    quantized = [NONE_QUANTIZED, *(each.name for each in list_quantized_methods())]
    return [each for each in on_float + quantized if re.search(pattern, each)]


def measure_before(task: Task, name: str, level: Level, start: float) -> dict[str, Any]:
    """Return the result of the model before any training.

    Args:
        task: the task.
        name: `NONE`, or `NONE_QUANTIZED` to measure it on the base of the methods.
        level: `QUICK` or `TABLE`.
        start: when the work for this result began.
    """
    params = task.params
    if name == NONE_QUANTIZED:
        qlora = next(each for each in list_quantized_methods() if each.name == QLORA)
        # v is zero, so merging returns the base.
        adapted, _ = adapt_params(task, qlora, jax.random.key(0))
        params = jlora.merge(adapted)
    metrics = [task.measure(params)]
    return make_result(task, name, level.name, metrics, time.perf_counter() - start)


def run_method(task: Task, method: Method, level: Level) -> dict[str, Any]:
    """Return the result of one method at its best learning rate."""
    before, start = read_processor_seconds(), time.perf_counter()
    trainer = Trainer(task, method)
    tuned = trainer.tune(level.num_rates, seed=0)
    others = [trainer.train(tuned.rate, seed) for seed in range(1, level.num_seeds)]
    runs = [tuned.run, *others]

    # The first run of a method compiles its step, unless a grid came before.
    times = [run.step_ms for run in (others or runs)]
    metrics = [task.measure(run.params) for run in runs]
    seconds = time.perf_counter() - start
    return make_result(
        task,
        method.name,
        level.name,
        metrics,
        seconds,
        rate=tuned.rate,
        errors=tuned.errors,
        step_ms=times,
        cost=trainer.measure_cost(),
        others_cores=count_others_cores(before, read_processor_seconds(), seconds),
    )
