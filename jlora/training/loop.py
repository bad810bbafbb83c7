"""The training loop: `fit`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jlora import _checks
from jlora._progress import Progress, report
from jlora._types import Float, Scalar, Tree
from jlora.adaptation.weight_trees import join
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


def fit(
    loss: Loss,
    adapted: Tree,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    also_train: str | None = None,
    progress: bool | None = None,
    log_every: int = 100,
) -> FitResult:
    """Return the adapted tree with its trainable arrays trained by an optax optimiser.

    It takes one step per batch. Frozen leaves keep their bits and have neither gradient
    nor optimiser state. If the loss becomes NaN or Inf, training stops, reports it on
    stderr and in `stop_reason`, and returns the factors at the last finite loss.

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
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        log_every: most steps between two looks at the loss; a bar looks twice a second.

    Returns:
        `FitResult`.

    Raises:
        TypeError: arguments of the wrong kind, or a loss that is no scalar.
        ValueError: nothing to train, or no batch.

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
    _check_fit(loss, optimizer, batches)
    log_every = _checks.check_integer(log_every, "log_every")
    if num_steps is not None:
        num_steps = _checks.check_integer(num_steps, "num_steps")

    state, frozen = init_train(adapted, optimizer, also_train=also_train)
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
    return _make_result(state, frozen, np.asarray(losses, np.float64))


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
    for count, batch in enumerate(batches, start=1):
        state, value = train_step(loss, optimizer, state, frozen, batch)
        pending.append(value)

        is_last = count == num_steps
        if bar.is_due(len(pending)) or is_last:
            losses += jax.device_get(pending)
            bar.advance(len(pending), f"loss {losses[-1]:.4g}")
            pending = []
        if is_last or (not pending and not bool(state.is_finite)):
            break

    losses += jax.device_get(pending)
    return state, losses


def _make_result(state: TrainState, frozen: Tree, losses: np.ndarray) -> FitResult:
    adapted = join(state.trainable, frozen)
    if bool(state.is_finite):
        return FitResult(adapted, losses, state.opt_state, None)

    step = int(np.flatnonzero(~np.isfinite(losses))[0])
    reason = (
        f"the loss became {losses[step]} at step {step + 1}; the factors are the ones "
        f"of step {max(step - 1, 0)}, where it was last finite. Lower the learning "
        "rate or check the batch."
    )
    report(f"fit stopped: {reason}")
    return FitResult(adapted, losses[: step + 1], state.opt_state, reason)


def _check_fit(loss: Any, optimizer: Any, batches: Any) -> None:
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a function of (params, batch), got {type(loss).__name__}. "
            "Pass one."
        )

    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be an optax.GradientTransformation, got "
            f"{type(optimizer).__name__}. Write for example optax.adam(1e-3)."
        )

    if not hasattr(batches, "__iter__"):
        raise TypeError(
            f"`batches` must be iterable, got {type(batches).__name__}. "
            "Put a single batch in a list."
        )


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
