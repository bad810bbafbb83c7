"""Whether an optimiser takes a traced rate, and padded factors, without a change."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._types import Array, Int, PRNGKey, Tree
from jlora.training.candidates import MakeOptimizer
from jlora.training.folds import make_generator
from jlora.training.padding import mask_padding, pad_weights
from jlora.training.rank_trees import RankTrees
from jlora.training.step_programs import apply_optimizer

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
    plain = trees.split(index, rank)
    padded = trees.split(index, padded_rank)

    # One program for both: compiling takes most of the time of this test run.
    @jax.jit
    def compare(
        plain: Any, padded: Any, gradients: list[Tree]
    ) -> tuple[list[Tree], list[Tree]]:
        count = jnp.asarray(rank, jnp.int32)
        expected = _run_updates(optimizer, plain, gradients, count)
        gradients = pad_weights(gradients, padded_rank)
        found = _run_updates(optimizer, padded, gradients, count)
        return pad_weights(expected, padded_rank), found

    trees_of_updates = compare(plain, padded, _draw_gradients(plain[0], key))
    pairs = zip(*map(jax.tree.leaves, trees_of_updates), strict=True)
    return all(_is_close(one, other) for one, other in pairs)


def _run_updates(
    optimizer: optax.GradientTransformation,
    halves: tuple[Tree, Tree],
    gradients: list[Tree],
    rank: Int[Array, ""],
) -> list[Tree]:
    trainable, frozen = halves
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


def _draw_gradients(tree: Tree, key: PRNGKey) -> list[Tree]:
    """Return random trees of these shapes, one for each size of gradient."""
    generator = make_generator(key, 0)

    def draw(leaf: Array, scale: float) -> np.ndarray:
        return np.asarray(scale * generator.standard_normal(leaf.shape), leaf.dtype)

    return [
        jax.tree.map(functools.partial(draw, scale=scale), tree)
        for scale in _GRADIENT_SCALES
    ]


def _is_close(one: Any, other: Any) -> bool:
    one, other = (np.asarray(each, np.float64) for each in (one, other))
    largest = float(np.max(np.abs(one), initial=0.0))
    return np.allclose(other, one, rtol=0, atol=_TOLERANCE * largest, equal_nan=True)
