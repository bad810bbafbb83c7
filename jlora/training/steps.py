"""One training step as a pure function, and its state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    last_good: Tree  # the same tree at the last finite loss, all of it finite
    opt_state: Any  # optax state of `trainable`
    step: Int[Array, ""]  # updates made
    is_finite: Bool[Array, ""]  # once False, further steps change nothing


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
) -> tuple[TrainState, Float[Array, ""]]:
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
    return _compile_step(loss, optimizer)(state, frozen, batch)


# A program of 3 MB for each new function or optimiser: those used last are kept.
@functools.lru_cache(maxsize=16)
def _compile_step(loss: Loss, optimizer: optax.GradientTransformation) -> Callable:
    step = functools.partial(_take_step, loss, optimizer)
    return jax.jit(step, donate_argnums=0)


def _take_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Tree,
    batch: Any,
) -> tuple[TrainState, Array]:
    # A line search passes all extra arguments on to `value_fn`, also `frozen`.
    def evaluate(trainable: Tree, frozen: Tree = frozen) -> Array:
        return _check_loss(loss(join(trainable, frozen), batch))

    # Differentiate, and let the optimiser see all that it may ask for.
    value, gradient = jax.value_and_grad(evaluate)(state.trainable)
    optimizer = optax.with_extra_args_support(optimizer)
    extra = {
        "value": value,
        "grad": gradient,
        "value_fn": evaluate,
        "frozen": frozen,
    }
    updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.trainable, **_pick_known(optimizer, extra)
    )
    updated = optax.apply_updates(state.trainable, updates)

    # Keep the old state if the loss or an updated array is not finite, now or before.
    is_loss_good = jnp.isfinite(value) | _is_guarded(state.opt_state)
    proceed = state.is_finite & is_loss_good & _is_all_finite(updated)
    # Arrays that gave a finite loss are good, also if their update is not.
    is_good = state.is_finite & is_loss_good
    good = _select(is_good, state.trainable, state.last_good)
    new_state = TrainState(
        _select(proceed, updated, good),
        good,
        _select(proceed, opt_state, state.opt_state),
        state.step + proceed.astype(jnp.int32),
        proceed,
    )
    return new_state, value


def _select(condition: Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(functools.partial(jnp.where, condition), new, old)


def _check_loss(value: Any) -> Any:
    """Refuse a loss that is no real number: JAX would name none of our arguments."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if isinstance(value, float):
        return value
    if dtype is not None and shape == () and jnp.issubdtype(dtype, jnp.floating):
        return value
    got = type(value).__name__ if dtype is None else f"{dtype} of shape {shape}"
    raise TypeError(
        f"`loss` must return one real floating number, got {got}. Return the loss "
        "itself, without auxiliary values."
    )


def _is_all_finite(tree: Tree) -> Array:
    """Return whether all floating arrays of a tree are finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks))


def _is_guarded(opt_state: Any) -> bool:
    """Return whether optax.apply_if_finite is part of the optimiser."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_guard)
    return any(map(_is_guard, nodes))


def _is_guard(node: Any) -> bool:
    return isinstance(node, optax.ApplyIfFiniteState)


def _pick_known(
    optimizer: optax.GradientTransformationExtraArgs, extra: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments that `optimizer.update` takes by name."""
    parameters = inspect.signature(optimizer.update).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return extra
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in extra.items() if name in names}
