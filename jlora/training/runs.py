"""One run of `fit`: its steps, and everything that happens between them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from jlora._progress import Progress, report
from jlora._types import PRNGKey, Tree
from jlora.adaptation.weight_trees import join
from jlora.training.batches import BatchFeed, count_examples
from jlora.training.fit_result import FitResult
from jlora.training.monitor import Callback, MetricsFile, Monitor
from jlora.training.run_checkpoints import Resumed, RunCheckpoints
from jlora.training.step_programs import TrainState

Record: TypeAlias = tuple[Any, dict[str, Any]]  # loss and metrics of one step

_CAUSES = (
    "Likely causes, in order: the learning rate is too high; a batch holds NaN, Inf or "
    "very large values; the loss divides by zero or takes the logarithm of it"
)


@dataclasses.dataclass
class Run:
    """The parts and the state of a run; `finish` takes all its steps."""

    state: TrainState
    frozen: Tree  # whose bits the result has
    computed: Tree  # the frozen tree in the dtype of the computation
    key: PRNGKey | None  # of the whole run
    programs: tuple[Callable, Callable]  # of one step, and of several stacked ones
    feed: BatchFeed
    monitor: Monitor
    checkpoints: RunCheckpoints | None
    callback: Callback | None
    open_metrics: Callable[[int], MetricsFile]  # takes the step of a resumption
    bar: Progress

    def __post_init__(self) -> None:
        self._records: list[Record] = []
        self._pending: list[tuple[int, Any]] = []  # (steps, arrays on the device)
        self._num_pending = 0
        self._num_taken = 0
        self._saved_at = 0
        self._num_examples = 0
        self._started_at = time.perf_counter()

    def finish(self) -> FitResult:
        """Take all steps and return the result."""
        try:
            self._resume()
            self._take_steps()
            self._look()
            if self._records and self.checkpoints is not None:
                self._save(self._num_taken, None)
                self.checkpoints.close()
        except BaseException as error:
            self._rescue(error)
            raise
        finally:
            self.bar.close()
            if self.checkpoints is not None:
                with contextlib.suppress(Exception):  # an error is on its way already
                    self.checkpoints.close()
        if not self._records:
            raise ValueError(
                "`batches` must hold at least one batch, got none. "
                "An iterator can be used only once."
            )
        result = self._make_result()
        if result.stop_reason is not None:
            report(f"fit stopped: {result.stop_reason}")
        return result

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = None
        if self.checkpoints is not None:
            found = self.checkpoints.restore(self.state)
        self._metrics = self.open_metrics(0 if found is None else found.num_batches)
        if found is None:
            return
        self.state = found.state
        self.feed.skip(found.num_batches, found.iterator_state)
        self.monitor.evaluations[:] = found.evaluations
        self.monitor.best = found.best
        self._records = _unpack(found.records)
        self._num_taken = self._saved_at = found.num_batches
        self.bar.advance(found.num_batches, "resumed")
        if self._is_at(self.monitor.every):
            self._evaluate()  # the run was interrupted just before

    def _take_steps(self) -> None:
        """Take the steps of all batches, or until there is a reason to stop."""
        if self.stop_reason is not None:  # of a run that was resumed
            return
        group = self.feed.next_group(self._find_limit())
        while group:
            self._dispatch(group)
            # What is saved now must not count the batches that are read ahead.
            place = self.feed.get_place()
            group = self.feed.next_group(self._find_limit())
            if self.bar.is_due(self._num_pending) or not group:
                self._look()
            if self._is_at(self.monitor.every):
                self._evaluate()
            if self.checkpoints is not None and self._is_at(self.checkpoints.every):
                self._save(*place)
            if self.stop_reason is not None:
                return

    @property
    def stop_reason(self) -> str | None:
        """Why the run should end now, as far as the device was looked at."""
        if not self._pending and not bool(self.state.is_finite):
            return "a value is not finite"
        return self.monitor.stop_reason

    def _find_limit(self) -> int | None:
        """Return the steps to the next evaluation or checkpoint; None: none is due."""
        everys = [self.monitor.every]
        if self.checkpoints is not None:
            everys.append(self.checkpoints.every)
        limits = [each - self._num_taken % each for each in everys if each is not None]
        return min(limits, default=None)

    def _is_at(self, every: int | None) -> bool:
        return every is not None and self._num_taken % every == 0

    def _dispatch(self, group: list[Any]) -> None:
        """Start the steps of some batches of one shape; nothing is awaited."""
        run_one, run_many = self.programs
        if len(group) == 1:
            self.state, found = run_one(self.state, self.computed, group[0], self.key)
        else:
            batches = tuple(group)
            self.state, found = run_many(self.state, self.computed, batches, self.key)
        self._pending.append((len(group), found))
        self._num_pending += len(group)
        self._num_taken += len(group)
        self._num_examples += len(group) * count_examples(group[0])

    def _look(self) -> None:
        """Wait for the device, and show and keep the numbers of its steps."""
        if not self._pending:
            return
        count = self._num_pending
        for steps, found in jax.device_get(self._pending):
            loss, metrics = found
            stacked = (loss, _name_metrics(metrics))
            self._records += [stacked] if steps == 1 else _split_rows(stacked, steps)
        self._pending, self._num_pending = [], 0

        first = len(self._records) - count
        self._metrics.add(
            (step, {"loss": loss, **metrics})
            for step, (loss, metrics) in enumerate(self._records[first:], first + 1)
        )
        loss, metrics = self._records[-1]
        self.bar.advance(count, f"loss {float(loss):.4g}{self._describe_rate()}")
        if self.callback is not None:
            values = {"loss": loss, **metrics}
            numbers = {k: float(v) for k, v in values.items() if np.size(v) == 1}
            self.callback(len(self._records), numbers)

    def _describe_rate(self) -> str:
        seconds = time.perf_counter() - self._started_at
        if not self._num_examples:
            return ""
        return f", {self._num_examples / max(seconds, 1e-9):.0f} examples/s"

    def _evaluate(self) -> None:
        """Evaluate the present tree, unless a step before was not finite."""
        self._look()
        if not bool(self.state.is_finite):
            return
        adapted = join(self.state.trainable, self.frozen)
        found = self.monitor.see(self._num_taken, self.state.trainable, adapted)
        if found is None:
            return
        self._metrics.add([(found.step, {"evaluation": found.values})])
        if self.callback is not None:
            self.callback(found.step, dict(found.values))

    def _save(self, num_batches: int, iterator_state: Any) -> None:
        """Begin to write a checkpoint of this moment."""
        self._look()
        assert self.checkpoints is not None
        if num_batches == self._saved_at:
            return
        self._saved_at = num_batches
        self.checkpoints.save(
            Resumed(
                self.state,
                self.monitor.best,
                _pack(self._records),
                self.monitor.evaluations,
                num_batches,
                iterator_state,
            )
        )

    def _rescue(self, error: BaseException) -> None:
        """Keep the training so far: on the exception, and in a checkpoint."""
        if not self._num_taken or self.state.step.is_deleted():
            return
        with contextlib.suppress(Exception):  # the first error is the one to see
            self._look()
        if not self._records:
            return
        error.fit_result = self._make_result()  # type: ignore[attr-defined]
        error.add_note(
            f"fit had taken {len(self._records)} steps; the trained tree is in the "
            "attribute `fit_result` of this exception."
        )
        if self.checkpoints is not None and not isinstance(error, OSError):
            with contextlib.suppress(Exception):
                self._save(self._num_taken, None)

    def _make_result(self) -> FitResult:
        losses = np.asarray([loss for loss, _ in self._records], np.float64)
        reason = self.monitor.stop_reason
        if not bool(self.state.is_finite):
            num_kept, reason = _explain_stop(losses, int(self.state.step))
            losses = losses[:num_kept]
        best = self.monitor.best
        return FitResult(
            join(self.state.trainable, self.frozen),
            losses,
            self.state.opt_state,
            reason,
            _stack_metrics(self._records[: len(losses)]),
            tuple(self.monitor.evaluations),
            None if best is None else join(best, self.frozen),
        )


def _explain_stop(losses: np.ndarray, num_good: int) -> tuple[int, str]:
    """Return how many losses to keep, and why a run stopped at a value."""
    bad_steps = np.flatnonzero(~np.isfinite(losses))
    if not bad_steps.size or num_good < bad_steps[0]:
        return num_good + 1, (
            f"the update of step {num_good + 1} is not finite; the factors are the "
            f"ones before it. {_CAUSES}"
        )
    step = int(bad_steps[0])
    return step + 1, (
        f"the loss became {losses[step]} at step {step + 1}; the factors are the ones "
        f"of step {max(step - 1, 0)}, where it was last finite. {_CAUSES}"
    )


def _split_rows(stacked: Record, steps: int) -> list[Record]:
    """Return the record of each step of a scan."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(steps)]


def _name_metrics(metrics: Any) -> dict[str, Any]:
    """Return {path: array} of the metrics of a loss."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(metrics)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") or "metrics": leaf
        for path, leaf in leaves
    }


def _stack_metrics(records: list[Record]) -> dict[str, np.ndarray] | None:
    """Return the metrics of all steps; None: the loss has none."""
    names = list(records[0][1]) if records else []
    stacked = {name: np.stack([each[name] for _, each in records]) for name in names}
    return stacked or None


def _pack(records: list[Record]) -> dict[str, np.ndarray]:
    """Return losses and metrics of all steps as arrays, to be saved."""
    losses = np.stack([loss for loss, _ in records])
    metrics = _stack_metrics(records) or {}
    return {"loss": losses, **{f"metric {name}": m for name, m in metrics.items()}}


def _unpack(arrays: dict[str, np.ndarray]) -> list[Record]:
    """Return the records that `_pack` packed."""
    start = "metric "
    metrics = {n.removeprefix(start): m for n, m in arrays.items() if n != "loss"}
    return [
        (loss, {name: each[i] for name, each in metrics.items()})
        for i, loss in enumerate(arrays["loss"])
    ]
