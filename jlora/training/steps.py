"""One training step as a pure function, and its state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._types import Array, Bool, Float, Int, Tree
from jlora.adaptation.weight_trees import join, split_trainable

Loss = Callable[[Tree, Any], Array]  # loss(params, batch) -> scalar


class TrainState(NamedTuple):
    """The arguments of the next training step; donated, so use only the newest one.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> state, frozen = jlora.init_train(adapted, optax.sgd(0.1))
        >>> int(state.step), bool(state.is_finite)
        (0, True)
    """

    trainable: Tree  # the trained arrays
    last_good: Tree  # the same tree at the last finite loss
    opt_state: Any  # optax state of `trainable`
    step: Int[Array, ""]  # updates made
    is_finite: Bool[Array, ""]  # once False, further steps change nothing


def init_train(
    adapted: Tree,
    optimizer: optax.GradientTransformation,
    *,
    also_train: str | None = None,
) -> tuple[TrainState, Tree]:
    """Return (state, frozen), the first arguments of `train_step`.

    Args:
        adapted: tree from `adapt`; the trained arrays are copied.
        optimizer: any optax.GradientTransformation.
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
    # Copies, because the step donates its state: no buffer of it may be the caller's,
    # or stand in it twice.
    opt_state = jax.tree.map(jnp.copy, optimizer.init(trainable))
    trainable, last_good = (jax.tree.map(jnp.copy, trainable) for _ in range(2))
    step, is_finite = jnp.zeros((), jnp.int32), jnp.array(True)
    return TrainState(trainable, last_good, opt_state, step, is_finite), frozen


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    batch: Any,
) -> tuple[TrainState, Float[Array, ""]]:
    """Return (state, loss) after one update; the given state is donated.

    A loss that is not finite changes nothing except `is_finite`, and so does every step
    after it.

    An optimiser with extra arguments (optax.GradientTransformationExtraArgs) receives,
    by
    name: `value`, the loss; `grad`, its gradient; `value_fn`, the loss as a function of
    the trainable tree; and `frozen`, the tree of frozen arrays. So optax's `lbfgs`,
    `polyak_sgd` and `reduce_on_plateau` work, and a rule for v can read the frozen u.

    Args:
        loss: loss(params, batch) -> scalar, static.
        optimizer: any optax.GradientTransformation, static.
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
        >>> def loss(params, batch):
        ...     return jnp.sum(batch @ params["w"])
        >>> batch = jnp.ones((2, 4))
        >>> state, value = jlora.train_step(loss, optax.sgd(0.1), state, frozen, batch)
        >>> int(state.step)
        1
    """
    return _train_step(loss, optimizer, state, frozen, batch)


@functools.partial(
    jax.jit, static_argnames=("loss", "optimizer"), donate_argnames="state"
)
def _train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    batch: Any,
) -> tuple[TrainState, Array]:
    # A line search passes all extra arguments on to `value_fn`, also `frozen`.
    def evaluate(trainable: Tree, frozen: Tree = frozen) -> Array:
        return loss(join(trainable, frozen), batch)

    # Differentiate, and let the optimiser see all that it may ask for.
    value, gradient = jax.value_and_grad(evaluate)(state.trainable)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        gradient,
        state.opt_state,
        state.trainable,
        value=value,
        grad=gradient,
        value_fn=evaluate,
        frozen=frozen,
    )
    updated = optax.apply_updates(state.trainable, updates)

    # Keep the old state if the loss is not finite, now or before.
    proceed = state.is_finite & jnp.isfinite(value)
    select = functools.partial(jax.tree.map, functools.partial(jnp.where, proceed))
    new_state = TrainState(
        select(updated, state.last_good),
        select(state.trainable, state.last_good),
        select(opt_state, state.opt_state),
        state.step + proceed.astype(jnp.int32),
        proceed,
    )
    return new_state, value
