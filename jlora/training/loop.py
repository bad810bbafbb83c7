"""The training loop: `fit`, and the pure pieces it is made of."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import _checks
from jlora._progress import Progress, report
from jlora.adaptation.adapted_weight import join, split_trainable


class TrainState(NamedTuple):
    """What a training step takes and gives back; donated, so use only the newest one.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> state, frozen = jlora.init_train(adapted, optax.sgd(0.1))
        >>> int(state.step), bool(state.is_finite)
        (0, True)
    """

    trainable: Any  # tree of what is trained
    last_good: Any  # the same tree where the loss was last seen finite
    opt_state: Any  # optax state of `trainable`
    step: jax.Array  # int32, updates made
    is_finite: jax.Array  # bool; once False, further steps change nothing


class FitResult(NamedTuple):
    """What `fit` gives back.

    Example:
        >>> import jlora
        >>> jlora.training.FitResult._fields
        ('adapted', 'losses', 'opt_state', 'stop_reason')
    """

    adapted: Any  # the tree with the trained factors in it
    losses: np.ndarray  # [steps] float64, the loss before each update
    opt_state: Any  # optax state after the last update
    stop_reason: str | None  # None: all batches done; else why it ended early


def fit(
    loss,
    adapted,
    optimizer,
    batches,
    *,
    num_steps=None,
    also_train=None,
    progress=None,
    log_every=100,
):
    """Return the adapted tree with its chosen parts trained by an optax optimiser.

    One step a batch. Frozen leaves come back as the same bits and have neither gradient nor
    optimiser state. If the loss becomes NaN or Inf, training stops, says so on stderr and in
    `stop_reason`, and gives back the factors at which the loss was last finite.

    Args:
        loss: loss(params, batch) -> scalar. It sees the adapted tree: use a model that multiplies
            with jlora.linear, or jlora.on_merged(loss). Keep one function object over several
            calls: the compiled step is reused for the same one.
        adapted: tree from `adapt`; its arrays are not donated.
        optimizer: optax.GradientTransformation.
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
        ...     return jnp.mean((jlora.linear(x, params["w"]) - y) ** 2)
        >>> batch = (jnp.eye(4), jnp.ones((4, 3)))
        >>> result = jlora.fit(loss, adapted, optax.adam(0.1), [batch] * 50, progress=False)
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
        state, losses = _run(loss, optimizer, state, frozen, batches, num_steps, bar)
    finally:
        bar.close()
    if not losses:
        raise ValueError(
            "`batches` must hold at least one batch, got none. An iterator can be used only once."
        )
    return _make_result(state, frozen, np.asarray(losses, np.float64))


def init_train(adapted, optimizer, *, also_train=None):
    """Return (state, frozen): what `train_step` starts from.

    Args:
        adapted: tree from `adapt`; what is trained is copied.
        optimizer: optax.GradientTransformation.
        also_train: as in `split_trainable`.

    Returns:
        `TrainState`, and the frozen tree of `split_trainable`.

    Raises:
        ValueError: nothing to train.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> state, frozen = jlora.init_train(adapted, optax.adam(0.1))
        >>> state.trainable["w"].v.shape, frozen["w"].base.shape
        ((1, 3), (4, 3))
    """
    trainable, frozen = split_trainable(adapted, also_train=also_train)
    # Two copies: the step donates both, and neither may be the caller's own buffer.
    trainable, last_good = (jax.tree.map(jnp.copy, trainable) for _ in range(2))
    state = TrainState(
        trainable,
        last_good,
        optimizer.init(trainable),
        jnp.zeros((), jnp.int32),
        jnp.array(True),
    )
    return state, frozen


@functools.partial(
    jax.jit, static_argnames=("loss", "optimizer"), donate_argnames="state"
)
def train_step(loss, optimizer, state, frozen, batch):
    """Return (state, loss) after one update; the state given is donated.

    A loss that is not finite changes nothing but `is_finite`, and so does every step after it.

    Args:
        loss: loss(params, batch) -> scalar, static.
        optimizer: optax.GradientTransformation, static.
        state: `TrainState`, donated.
        frozen: tree from `init_train`.
        batch: pytree of arrays.

    Returns:
        The new `TrainState`, and the loss before the update.

    Raises:
        TypeError: a loss that is no scalar.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> state, frozen = jlora.init_train(adapted, optax.sgd(0.1))
        >>> loss = jlora.on_merged(lambda params, batch: jnp.sum(params["w"] * batch))
        >>> state, value = jlora.train_step(loss, optax.sgd(0.1), state, frozen, jnp.ones((4, 3)))
        >>> int(state.step)
        1
    """
    value, gradient = jax.value_and_grad(lambda part: loss(join(part, frozen), batch))(
        state.trainable
    )
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
    updated = optax.apply_updates(state.trainable, updates)
    proceed = state.is_finite & jnp.isfinite(value)
    select = functools.partial(jax.tree.map, functools.partial(jnp.where, proceed))
    return TrainState(
        select(updated, state.last_good),
        select(state.trainable, state.last_good),
        select(opt_state, state.opt_state),
        state.step + proceed.astype(jnp.int32),
        proceed,
    ), value


def _run(loss, optimizer, state, frozen, batches, num_steps, bar):
    """Step through the batches; look at the device only when the bar is due."""
    losses, pending = [], []
    for count, batch in enumerate(batches, start=1):
        state, value = train_step(loss, optimizer, state, frozen, batch)
        pending.append(value)
        last = count == num_steps
        if bar.is_due(len(pending)) or last:
            losses += jax.device_get(pending)
            bar.advance(len(pending), f"loss {losses[-1]:.4g}")
            pending = []
        if last or (not pending and not bool(state.is_finite)):
            break
    losses += jax.device_get(pending)
    return state, losses


def _make_result(state, frozen, losses):
    if bool(state.is_finite):
        return FitResult(join(state.trainable, frozen), losses, state.opt_state, None)
    step = int(np.flatnonzero(~np.isfinite(losses))[0])
    reason = (
        f"the loss became {losses[step]} at step {step + 1}; the factors are those of step "
        f"{max(step - 1, 0)}, where it was last finite. Lower the learning rate or check the batch."
    )
    report(f"fit stopped: {reason}")
    return FitResult(
        join(state.trainable, frozen), losses[: step + 1], state.opt_state, reason
    )


def _check_fit(loss, optimizer, batches):
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a function of (params, batch), got {type(loss).__name__}. Pass one."
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"`optimizer` must be an optax.GradientTransformation, got {type(optimizer).__name__}. "
            "Write for example optax.adam(1e-3)."
        )
    if not hasattr(batches, "__iter__"):
        raise TypeError(
            f"`batches` must be iterable, got {type(batches).__name__}. "
            "Put a single batch in a list."
        )


def _length(batches):
    return len(batches) if hasattr(batches, "__len__") else None
