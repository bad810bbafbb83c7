"""The training loop: `fit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import _checks
from jlora._progress import Progress, report
from jlora._types import Float, Scalar, Tree
from jlora.adaptation.weight_trees import join, split_trainable
from jlora.training.batches import ShapeCounter, to_arrays
from jlora.training.fit_checks import check_fit
from jlora.training.steps import Loss, TrainState, init_train, train_step


class FitResult(NamedTuple):
    """The result of `fit`.

    Example:
        >>> import jlora
        >>> jlora.training.FitResult._fields
        ('adapted', 'losses', 'opt_state', 'stop_reason')
    """

    adapted: Tree  # with the trained factors
    losses: Float[np.ndarray, " steps"]  # float64, the loss before each update
    opt_state: Any  # optax state after the last update
    stop_reason: str | None  # None: all batches done; else why it ended early

    def __repr__(self) -> str:
        first, last = (f"{value:.4g}" for value in self.losses[[0, -1]])
        return (
            f"FitResult({len(self.losses)} losses from {first} to {last}, "
            f"stop_reason={self.stop_reason!r})"
        )


def fit(
    loss: Loss,
    adapted: Tree,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    also_train: str | None = None,
    opt_state: Any | None = None,
    progress: bool | None = None,
    log_every: int = 100,
) -> FitResult:
    """Return the adapted tree with its trainable arrays trained by an optax optimiser.

    It takes one step per batch. Frozen leaves keep their bits and have neither gradient
    nor optimiser state. If the loss or a trained array becomes NaN or Inf, training
    stops, reports it on stderr and in `stop_reason`, and returns the factors at the
    last finite loss.

    A loss that multiplies with `batch @ params["w"]` or `jlora.linear` works directly.
    Wrap any other loss in `jlora.lift(loss)`, which never forms the weights, or in
    `jlora.on_merged(loss)`, which forms them in each step.

    Args:
        loss: loss(params, batch) -> scalar, of the adapted tree. Pass the same function
            object in several calls: the compiled step is reused for it.
        adapted: tree from `adapt`; its arrays are not donated.
        optimizer: any optax.GradientTransformation, or one of `jlora.optimizers`. Those
            with extra arguments receive `value`, `grad`, `value_fn` and `frozen`, see
            `train_step`.
        batches: iterable of pytrees of arrays of one shape; consumed up to num_steps.
        num_steps: most steps to take, ≥ 1. None: as many as there are batches.
        also_train: as in `split_trainable`.
        opt_state: `FitResult.opt_state` of an earlier call on the tree that it
            returned: both runs together are then one run. None: a new state.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        log_every: most steps between two looks at the loss; a bar looks twice a second.
            After a loss that is not finite so many batches may still be read.

    Returns:
        `FitResult`.

    Raises:
        TypeError: arguments of the wrong kind, or a loss that is no scalar.
        ValueError: nothing to train, no batch, or an `opt_state` of another run.
        Any exception of `batches` or of an interrupt, with the `FitResult` so far in
            its attribute `fit_result`.

    Cost: a step is one value and gradient; the trained leaves are held twice.

    Gradients: not differentiable.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> batches = [(jnp.eye(4), jnp.ones((4, 3)))] * 50
        >>> result = jlora.fit(loss, adapted, optax.adam(0.1), batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0]), result.stop_reason
        (True, None)
    """
    check_fit(loss, adapted, optimizer, batches)
    log_every = _checks.check_integer(log_every, "log_every")
    if num_steps is not None:
        num_steps = _checks.check_integer(num_steps, "num_steps")

    state, frozen = init_train(
        adapted, optimizer, also_train=also_train, opt_state=opt_state
    )
    total = num_steps if num_steps is not None else _length(batches)
    bar = Progress("fit", total, enabled=progress, every=log_every)
    try:
        state, losses = _run_steps(
            loss, optimizer, state, frozen, batches, num_steps, bar
        )
    finally:
        bar.close()

    if not losses:
        raise ValueError(
            "`batches` must hold at least one batch, got none. "
            "An iterator can be used only once."
        )
    result = _make_result(state, frozen, np.asarray(losses, np.float64))
    before, _ = split_trainable(adapted, also_train=also_train)
    if result.stop_reason is None and not _has_moved(before, state.trainable):
        report(
            f"fit: no trained array changed in {len(losses)} steps. Check the loss, "
            "and whether the optimiser waits for more steps."
        )
    return result


def _has_moved(before: Tree, after: Tree) -> bool:
    """Return whether an array differs between two trees of one structure."""
    pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
    return not all(bool(jnp.array_equal(old, new)) for old, new in pairs)


def _run_steps(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    batches: Iterable[Any],
    num_steps: int | None,
    bar: Progress,
) -> tuple[TrainState, list[Scalar]]:
    """Step through the batches; look at the device only when the bar is due."""
    losses, pending = [], []
    shapes = ShapeCounter()
    try:
        for count, batch in enumerate(batches, start=1):
            batch = to_arrays(batch)
            shapes.count(batch)
            state, value = train_step(loss, optimizer, state, frozen, batch)
            pending.append(value)

            is_last = count == num_steps
            if bar.is_due(len(pending)) or is_last:
                losses += jax.device_get(pending)
                bar.advance(len(pending), f"loss {losses[-1]:.4g}")
                pending = []
            if is_last or (not pending and not bool(state.is_finite)):
                break
    except BaseException as error:
        _attach_result(error, state, frozen, losses + pending)
        raise

    losses += jax.device_get(pending)
    return state, losses


def _attach_result(
    error: BaseException, state: TrainState, frozen: Tree, losses: list[Any]
) -> None:
    """Put the result so far on an exception, so that no training is lost."""
    if not losses or state.step.is_deleted():
        return
    values = np.asarray(jax.device_get(losses), np.float64)
    error.fit_result = _make_result(state, frozen, values)  # type: ignore[attr-defined]
    error.add_note(
        f"fit had taken {len(values)} steps; what they trained is in the attribute "
        "`fit_result` of this exception."
    )


def _make_result(state: TrainState, frozen: Tree, losses: np.ndarray) -> FitResult:
    adapted = join(state.trainable, frozen)
    if bool(state.is_finite):
        return FitResult(adapted, losses, state.opt_state, None)

    bad_steps = np.flatnonzero(~np.isfinite(losses))
    num_good = int(state.step)
    if not bad_steps.size or num_good < bad_steps[0]:
        reason = (
            f"the update of step {num_good + 1} is not finite; the factors are the "
            "ones before it. Lower the learning rate or check the batch."
        )
        report(f"fit stopped: {reason}")
        return FitResult(adapted, losses[: num_good + 1], state.opt_state, reason)

    step = int(bad_steps[0])
    reason = (
        f"the loss became {losses[step]} at step {step + 1}; the factors are the ones "
        f"of step {max(step - 1, 0)}, where it was last finite. Lower the learning "
        "rate or check the batch."
    )
    report(f"fit stopped: {reason}")
    return FitResult(adapted, losses[: step + 1], state.opt_state, reason)


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
