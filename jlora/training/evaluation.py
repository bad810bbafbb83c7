"""Accuracy on held-out data, and the cost of training."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora._types import Array, Tree
from jlora.training.steps import Loss, TrainState


class TrainingCost(NamedTuple):
    """Size of the trained arrays, from `measure_cost`.

    Example:
        >>> import jlora
        >>> jlora.training.TrainingCost(12, 96).optimizer_bytes
        96
    """

    num_trained: int  # trained elements
    optimizer_bytes: int  # bytes of the optimiser's state


def evaluate_loss(loss: Loss, adapted: Tree, batches: Iterable[Any]) -> float:
    """Return the mean of loss(adapted, batch) over batches of one size.

    Args:
        loss: loss(params, batch) -> scalar; as for `fit`.
        adapted: tree of weights, adapted or plain.
        batches: iterable of pytrees of arrays.

    Returns:
        float.

    Raises:
        ValueError: no batch.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> def loss(params, x):
        ...     return jnp.mean(params * x)
        >>> jlora.training.evaluate_loss(loss, 2.0, [jnp.ones(3)] * 2)
        2.0
    """
    values = [_evaluate(loss, adapted, batch) for batch in batches]
    if not values:
        raise ValueError(
            "`batches` must hold at least one batch, got none. "
            "An iterator can be used only once."
        )
    return float(np.mean(jax.device_get(values), dtype=np.float64))


def measure_cost(state: TrainState) -> TrainingCost:
    """Return the `TrainingCost` of a train state: trained elements, optimiser bytes.

    Args:
        state: `TrainState` from `init_train`.

    Returns:
        `TrainingCost`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> state, _ = jlora.init_train(adapted, optax.sgd(0.1))
        >>> jlora.training.measure_cost(state).num_trained
        3
    """
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    return TrainingCost(num_trained, optimizer_bytes)


@functools.partial(jax.jit, static_argnames="loss")
def _evaluate(loss: Loss, adapted: Tree, batch: Any) -> Array:
    return loss(adapted, batch)
