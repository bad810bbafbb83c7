"""The step and the held-out error of a grid of candidates: rank × rate × fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._types import AnyArray, Array, Bool, Float, Int, Tree
from jlora.adaptation.weight_trees import join
from jlora.training.padding import mask_padding
from jlora.training.rank_trees import FrozenLayout, StackedTrees
from jlora.training.step_programs import Loss, apply_optimizer

MakeOptimizer = Callable[[Any], optax.GradientTransformation]  # of a rate
Grid = tuple[int, int, int]  # numbers of ranks, rates and folds


class CandidateState(NamedTuple):
    """State of one candidate, or of a grid of them with three leading axes."""

    trainable: Tree
    opt_state: Any
    is_finite: Bool[Array, ""]  # whether every loss so far was finite


class Inputs(NamedTuple):
    """Arrays that the candidates of a grid read."""

    trees: StackedTrees
    ranks: Int[Array, " ranks"]
    rates: Float[Array, " rates"]  # weakly typed, like a Python float
    examples: Tree  # [examples, ...]


def init_candidates(
    make_optimizer: MakeOptimizer, inputs: Inputs, num_folds: int
) -> CandidateState:
    """Return the states of a grid before its first step."""

    def init(
        trainable: Tree, rank: Int[Array, ""], rate: Array, fold: Array
    ) -> CandidateState:
        del rank, fold
        opt_state = make_optimizer(rate).init(trainable)
        return CandidateState(trainable, opt_state, jnp.array(True))

    trees, folds = inputs.trees, jnp.arange(num_folds)
    over_folds = jax.vmap(init, (None, None, None, 0))
    over_rates = jax.vmap(over_folds, (None, None, 0, None))
    over_ranks = jax.vmap(over_rates, (0, 0, None, None))
    return over_ranks(trees.trainable, inputs.ranks, inputs.rates, folds)


def step_candidates(
    loss: Loss,
    make_optimizer: MakeOptimizer,
    layout: FrozenLayout,
    state: CandidateState,
    inputs: Inputs,
    index: Int[Array, "folds batch"],
) -> CandidateState:
    """Return the states of a grid after one step; `index` is the batch of each fold."""

    def step(
        state: CandidateState,
        moved: list[Array],
        rank: Int[Array, ""],
        rate: Array,
        index: Int[Array, " batch"],
    ) -> CandidateState:
        frozen = layout.join(moved, inputs.trees.shared)
        batch = take_examples(inputs.examples, index)
        return _step_candidate(loss, make_optimizer(rate), state, frozen, rank, batch)

    over_folds = jax.vmap(step, (0, None, None, None, 0))
    over_rates = jax.vmap(over_folds, (0, None, None, 0, None))
    over_ranks = jax.vmap(over_rates, (0, 0, 0, None, None))
    return over_ranks(state, inputs.trees.moved, inputs.ranks, inputs.rates, index)


def measure_candidates(
    metric: Loss,
    layout: FrozenLayout,
    trainable: Tree,
    inputs: Inputs,
    folds: Int[Array, " folds"],
    index: Int[Array, "folds count"],
    batch_size: int,
) -> Float[Array, "ranks rates folds"]:
    """Return the means of the metric over the held-out examples of some folds."""
    trainable = jax.tree.map(lambda leaf: leaf[:, :, folds], trainable)

    def measure(
        trainable: Tree, moved: list[Array], index: Int[Array, " count"]
    ) -> Float[Array, ""]:
        params = join(trainable, layout.join(moved, inputs.trees.shared))
        return _measure_mean(metric, params, inputs.examples, index, batch_size)

    over_folds = jax.vmap(measure, (0, None, 0))
    over_rates = jax.vmap(over_folds, (0, None, None))
    over_ranks = jax.vmap(over_rates, (0, 0, None))
    return over_ranks(trainable, inputs.trees.moved, index)


def take_examples(examples: Tree, index: Int[AnyArray, " count"]) -> Tree:
    """Return the batch of these examples."""
    return jax.tree.map(lambda leaf: leaf[index], examples)


def _step_candidate(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: CandidateState,
    frozen: Tree,
    rank: Int[Array, ""],
    batch: Any,
) -> CandidateState:
    def evaluate(trainable: Tree, frozen: Tree = frozen) -> Array:
        return loss(join(trainable, frozen), batch)

    value, gradient = jax.value_and_grad(evaluate)(state.trainable)
    gradient = mask_padding(gradient, rank)
    extra = {
        "value": value,
        "grad": gradient,
        "value_fn": evaluate,
        "frozen": frozen,
    }
    updates, opt_state = apply_optimizer(
        optimizer, gradient, state.opt_state, state.trainable, extra
    )

    updates = mask_padding(updates, rank)
    trainable = optax.apply_updates(state.trainable, updates)
    is_finite = state.is_finite & jnp.isfinite(value)
    return CandidateState(trainable, opt_state, is_finite)


def _measure_mean(
    metric: Loss,
    params: Tree,
    examples: Tree,
    index: Int[Array, " count"],
    batch_size: int,
) -> Float[Array, ""]:
    """Return the mean over batches, each weighted by its number of examples."""

    def measure(own: Int[Array, " batch"]) -> Float[Array, ""]:
        value = metric(params, take_examples(examples, own))
        return jnp.asarray(value).astype(float)

    num_full, num_left = divmod(len(index), batch_size)
    total = jnp.zeros((), float)
    if num_full:
        full = index[: num_full * batch_size].reshape(num_full, batch_size)
        total = jnp.mean(jax.lax.map(measure, full)) * (len(index) - num_left)
    if num_left:
        total = total + measure(index[-num_left:]) * num_left
    return total / len(index)
