"""Whether an optimiser takes a traced rate, and padded factors, without a change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._types import Array, Int, PRNGKey, Tree
from jlora.training.candidates import MakeOptimizer, apply_optimizer
from jlora.training.padding import mask_padding, pad_weights
from jlora.training.rank_trees import RankTrees

_GRADIENT_SCALES = (1.0, 1e4, 1e-4)  # clipping of any usual kind acts on one of them
_TOLERANCE = 1e-4  # relative; rounding of a few updates in float32 is far below it


def can_trace_rate(
    make_optimizer: MakeOptimizer, trainable: Tree, frozen: Tree
) -> bool:
    """Return whether the optimiser can be built from a traced rate.

    It cannot if it compares the rate with a number in Python, as some schedules do.
    """

    def update(rate: Array) -> Any:
        return _update(make_optimizer(rate), trainable, frozen, trainable)

    try:
        jax.eval_shape(update, jnp.asarray(1e-3))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return False
    return True


def can_pad(
    optimizer: optax.GradientTransformation,
    trees: RankTrees,
    index: int,
    rank: int,
    padded_rank: int,
    key: PRNGKey,
) -> bool:
    """Return whether padded factors get the updates that they get without padding.

    An optimiser of one entry at a time does, and so does a clipping by norms. One that
    looks at the shape, at means over entries or at drawn noise does not. We compare a
    few updates, with random gradients of several sizes.
    """
    trainable, frozen = trees.split(index, rank)
    padded_trainable, padded_frozen = trees.split(index, padded_rank)
    gradients = [
        _draw_like(trainable, jax.random.fold_in(key, i), scale)
        for i, scale in enumerate(_GRADIENT_SCALES)
    ]
    padded_gradients = [pad_weights(gradient, padded_rank) for gradient in gradients]

    count = jnp.asarray(rank, jnp.int32)
    run = jax.jit(lambda *arrays: _run_updates(optimizer, *arrays))
    plain = run(trainable, frozen, gradients, count)
    padded = run(padded_trainable, padded_frozen, padded_gradients, count)
    plain = [pad_weights(updates, padded_rank) for updates in plain]
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(padded), strict=True)
    return all(_is_close(one, other) for one, other in pairs)


def _run_updates(
    optimizer: optax.GradientTransformation,
    trainable: Tree,
    frozen: Tree,
    gradients: list[Tree],
    rank: Int[Array, ""],
) -> list[Tree]:
    opt_state = optimizer.init(trainable)
    found = []
    for gradient in gradients:
        updates, opt_state = _update(
            optimizer, trainable, frozen, gradient, opt_state=opt_state
        )
        found.append(mask_padding(updates, rank))
    return found


def _update(
    optimizer: optax.GradientTransformation,
    trainable: Tree,
    frozen: Tree,
    gradient: Tree,
    opt_state: Any = None,
) -> tuple[Tree, Any]:
    # A quadratic loss stands for the real one, which may be costly to compile.
    def evaluate(trainable: Tree, frozen: Any = None) -> Array:
        del frozen  # a line search passes it on
        leaves = jax.tree.leaves(trainable)
        return sum((jnp.sum(leaf**2).astype(float) for leaf in leaves), jnp.zeros(()))

    if opt_state is None:
        opt_state = optimizer.init(trainable)
    extra = {
        "value": evaluate(trainable),
        "grad": gradient,
        "value_fn": evaluate,
        "frozen": frozen,
    }
    return apply_optimizer(optimizer, gradient, opt_state, trainable, extra)


def _draw_like(tree: Tree, key: PRNGKey, scale: float) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        scale * jax.random.normal(own, leaf.shape, leaf.dtype)
        for own, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def _is_close(one: Any, other: Any) -> bool:
    one, other = (np.asarray(each, np.float64) for each in (one, other))
    largest = float(np.max(np.abs(one), initial=0.0))
    return np.allclose(other, one, rtol=0, atol=_TOLERANCE * largest, equal_nan=True)
