"""One training run at one learning rate, and the search for the rate."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks.tasks.methods import (
    Method,
    adapt_params,
    guess_rate,
    make_optimizer,
)
from benchmarks.tasks.task import Task

# Neighbours on the grid of rates differ by this factor, about half a decade.
GRID_FACTOR = 10**0.5
MAX_RATES = 7


class TrainedRun(NamedTuple):
    """The result of one training run."""

    params: Any  # plain arrays: the adapted weights are merged
    step_ms: float  # wall-clock time of the run, divided by its steps
    has_diverged: bool


class TunedRate(NamedTuple):
    """The learning rate with the lowest validation error, and its run."""

    rate: float
    errors: dict[float, float]  # {rate: validation error}, inf where it diverged
    run: TrainedRun  # at `rate`, of the seed that the rates were compared with


class Trainer:
    """Trains one method on one task; the compiled step is shared by all runs."""

    def __init__(self, task: Task, method: Method):
        self.task, self.method = task, method
        self.optimizer = make_optimizer(task, method)
        self.data = task.measure_moments() if method.needs_moments else None

    def train(self, rate: float, seed: int) -> TrainedRun:
        """Return the run at a learning rate. The seed draws factors and batches."""
        task = self.task
        adapted, also_train = self._adapt(seed)
        state, _ = jlora.init_train(adapted, self.optimizer, also_train=also_train)
        opt_state = optax.tree_utils.tree_set(state.opt_state, rate=jnp.float32(rate))

        # Sample first: the time is of the steps.
        batches = list(task.sample(seed))
        start = time.perf_counter()
        result = jlora.fit(
            task.loss,
            adapted,
            self.optimizer,
            batches,
            opt_state=opt_state,
            also_train=also_train,
            progress=False,
        )
        step_ms = 1e3 * (time.perf_counter() - start) / len(result.losses)
        diverged = result.stop_reason is not None
        return TrainedRun(jlora.merge(result.adapted), step_ms, diverged)

    def measure_cost(self) -> jlora.training.TrainingCost:
        """Return the number of trained elements and the bytes of the optimiser."""
        adapted, also_train = self._adapt(seed=0)
        state, _ = jlora.init_train(adapted, self.optimizer, also_train=also_train)
        return jlora.training.measure_cost(state)

    def tune(self, num_rates: int, seed: int) -> TunedRate:
        """Return the best rate of a grid around the first guess.

        While the best rate is at an end of the grid, the grid grows there.
        """
        runs: dict[float, TrainedRun] = {}

        def measure_error(rate: float) -> float:
            runs[rate] = run = self.train(rate, seed)
            error = math.inf if run.has_diverged else self.task.validate(run.params)
            return error if math.isfinite(error) else math.inf

        guess = guess_rate(self.task, self.method)
        errors = search_grid(measure_error, guess, num_rates)
        rate = min(errors, key=errors.__getitem__)
        return TunedRate(rate, errors, runs[rate])

    def _adapt(self, seed: int) -> tuple[Any, str | None]:
        return adapt_params(self.task, self.method, jax.random.key(seed), self.data)


def search_grid(
    measure: Callable[[float], float], guess: float, num_rates: int
) -> dict[float, float]:
    """Return {rate: error} of a geometric grid that reaches past its best rate.

    Args:
        measure: error of a rate.
        guess: rate in the middle of the first grid.
        num_rates: of the first grid. 1: only the guess.
    """
    first = -(num_rates // 2)
    errors = {step: math.nan for step in range(first, first + num_rates)}
    for step in errors:
        errors[step] = measure(guess * GRID_FACTOR**step)

    while 1 < len(errors) < MAX_RATES:
        best = min(errors, key=errors.__getitem__)
        if best not in (min(errors), max(errors)):
            break
        step = best - 1 if best == min(errors) else best + 1
        errors[step] = measure(guess * GRID_FACTOR**step)
    return {guess * GRID_FACTOR**step: errors[step] for step in sorted(errors)}
