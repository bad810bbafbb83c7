"""The state of a training run, and one step of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._types import PRNGKey, Tree
from jlora.adaptation.weight_trees import split_trainable
from jlora.training.step_programs import (
    Loss,
    StepOptions,
    TrainState,
    compile_step,
)


def init_train(
    adapted: Tree,
    optimizer: optax.GradientTransformation,
    *,
    also_train: str | None = None,
    opt_state: Any | None = None,
) -> tuple[TrainState, Tree]:
    """Return (state, frozen), the first arguments of `train_step`.

    Args:
        adapted: tree from `adapt`; the trained arrays are copied.
        optimizer: any optax.GradientTransformation.
        also_train: as in `split_trainable`.
        opt_state: the optax state of an earlier run with the same optimiser and tree,
            to go on with; copied. None: a new one.

    Returns:
        `TrainState`, and the frozen tree of `split_trainable`, on the device.

    Raises:
        ValueError: nothing to train, or a state of another optimiser or tree.

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
    # NumPy arrays would be sent to the device in each step.
    frozen = jax.tree.map(_to_device, frozen)
    # Copies, because the step donates its state: no buffer of it may be the caller's,
    # or stand in it twice.
    if opt_state is None:
        opt_state = _init_optimizer(optimizer, trainable)
    else:
        _check_state(opt_state, jax.eval_shape(optimizer.init, trainable))
    opt_state = jax.tree.map(jnp.copy, opt_state)
    trainable, last_good = (jax.tree.map(jnp.copy, trainable) for _ in range(2))
    step, is_finite = jnp.zeros((), jnp.int32), jnp.array(True)
    return TrainState(trainable, last_good, opt_state, step, is_finite), frozen


def _init_optimizer(optimizer: optax.GradientTransformation, trainable: Tree) -> Any:
    try:
        return optimizer.init(trainable)
    except AttributeError as error:
        raise TypeError(
            "`optimizer` must accept a tree with None in the place of frozen arrays, "
            f"got {error} from its init. Use another one."
        ) from error


def _to_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _check_state(opt_state: Any, expected: Any) -> None:
    def describe(state: Any) -> tuple:
        leaves, structure = jax.tree.flatten(state)
        return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]

    if describe(opt_state) != describe(expected):
        raise ValueError(
            "`opt_state` must be a state of this optimiser for these trained arrays, "
            "got another. Pass the opt_state of the FitResult to go on with."
        )


def train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    batch: Any,
    *,
    key: PRNGKey | None = None,
    has_aux: bool = False,
) -> tuple[TrainState, Any]:
    """Return (state, loss) after one update; the given state is donated.

    A loss or an updated array that is not finite changes nothing except `is_finite`,
    and so does every step after it. An `optax.apply_if_finite` decides about the loss
    itself.

    An optimiser with extra arguments (optax.GradientTransformationExtraArgs) receives
    those that its `update` takes by name: `value`, the loss; `grad`, its gradient;
    `value_fn`, the loss as a function of the trainable tree; and `frozen`, the tree of
    frozen arrays. So optax's `lbfgs`, `polyak_sgd` and `reduce_on_plateau` work, and a
    rule for v can read the frozen u.

    Args:
        loss: loss(params, batch) -> scalar, static; loss(params, batch, key) if `key`
            is given.
        optimizer: any optax.GradientTransformation, static.
        state: `TrainState`, donated.
        frozen: tree from `init_train`.
        batch: pytree of arrays.
        key: one typed PRNG key of the whole run; the loss gets it folded with the
            number of the step. None: the loss takes no key.
        has_aux: static, whether the loss returns (scalar, metrics).

    Returns:
        The new `TrainState`, and the loss before the update; with `has_aux` a pair of
        the loss and its metrics.

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
    run = compile_step(loss, optimizer, StepOptions(has_aux))
    state, (value, aux) = run(state, frozen, batch, key)
    return state, (value, aux) if has_aux else value
