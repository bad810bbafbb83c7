"""The compiled programs of training steps, one at a time or several in one call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._types import Array, Bool, DTypeLike, Int, PRNGKey, Tree
from jlora.adaptation.weight_trees import join
from jlora.quantization.quantized_array import QuantizedArray

# loss(params, batch) -> scalar, or loss(params, batch, key); with has_aux
# -> (scalar, metrics)
Loss = Callable[..., Any]


class StepOptions(NamedTuple):
    """The static settings of a step beside the loss and the optimiser."""

    has_aux: bool = False
    compute_dtype: Any = None  # of the trained arrays inside the loss; None: their own


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


# A program of 3 MB for each new function or optimiser: those used last are kept.
@functools.lru_cache(maxsize=16)
def compile_step(
    loss: Loss, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable:
    """Return the compiled (state, frozen, batch, key) -> (state, (loss, metrics))."""
    step = functools.partial(_take_step, loss, optimizer, options)
    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=16)
def compile_steps(
    loss: Loss, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable:
    """Return the compiled steps over a tuple of batches of one shape."""

    def take_steps(
        state: TrainState, frozen: Tree, batches: tuple[Any, ...], key: Any
    ) -> Any:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

        def take_one(state: TrainState, batch: Any) -> Any:
            return _take_step(loss, optimizer, options, state, frozen, batch, key)

        return jax.lax.scan(take_one, state, stacked)

    return jax.jit(take_steps, donate_argnums=0)


def _take_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    state: TrainState,
    frozen: Tree,
    batch: Any,
    key: PRNGKey | None,
) -> tuple[TrainState, tuple[Array, Any]]:
    own_key = () if key is None else (jax.random.fold_in(key, state.step),)

    # A line search passes all extra arguments on to `value_fn`, also `frozen`.
    def evaluate(trainable: Tree, frozen: Tree = frozen) -> tuple[Array, Any]:
        if options.compute_dtype is not None:
            trainable = cast_floating(trainable, options.compute_dtype)
        found = loss(join(trainable, frozen), batch, *own_key)
        value, aux = _split_aux(found) if options.has_aux else (found, None)
        return _check_loss(value), aux

    # Differentiate, and let the optimiser see all that it may ask for.
    (value, aux), gradient = jax.value_and_grad(evaluate, has_aux=True)(state.trainable)
    extra = {
        "value": value,
        "grad": gradient,
        "value_fn": lambda trainable, frozen=frozen: evaluate(trainable, frozen)[0],
        "frozen": frozen,
    }
    updates, opt_state = apply_optimizer(
        optimizer, gradient, state.opt_state, state.trainable, extra
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
    return new_state, (value, aux)


def _split_aux(found: Any) -> tuple[Any, Any]:
    if isinstance(found, tuple) and len(found) == 2:
        return found
    raise TypeError(
        "`loss` must return (loss, metrics) with has_aux=True, got "
        f"{type(found).__name__}. Return a pair, or leave has_aux out."
    )


def apply_optimizer(
    optimizer: optax.GradientTransformation,
    gradient: Tree,
    opt_state: Any,
    trainable: Tree,
    extra: dict[str, Any],
) -> tuple[Tree, Any]:
    """Return (updates, opt_state); the optimiser gets the extra arguments it names."""
    optimizer = optax.with_extra_args_support(optimizer)
    parameters = inspect.signature(optimizer.update).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = {parameter.name for parameter in parameters}
        extra = {name: value for name, value in extra.items() if name in names}
    return optimizer.update(gradient, opt_state, trainable, **extra)


def cast_floating(tree: Tree, dtype: DTypeLike) -> Tree:
    """Return the tree with its floating arrays in another dtype.

    A quantised array keeps its codes and scales, and stands for that dtype.
    """

    def cast(leaf: Any) -> Any:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_float else leaf

    return jax.tree.map(
        cast, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
    )


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
        "itself; for (loss, metrics) pass has_aux=True."
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
