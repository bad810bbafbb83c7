"""A grid of candidates trained together, in chunks that fit into the memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._progress import Progress
from jlora._types import Float, Int, Tree
from jlora.training.candidates import (
    CandidateState,
    Grid,
    Inputs,
    MakeOptimizer,
    init_candidates,
    measure_candidates,
    step_candidates,
)
from jlora.training.folds import Indices
from jlora.training.rank_trees import FrozenLayout, RankTrees, StackedTrees
from jlora.training.step_cost import read_memory
from jlora.training.steps import Loss


class Trials(NamedTuple):
    """Everything that all candidates have in common."""

    loss: Loss
    metric: Loss
    examples: Tree  # of jax arrays
    batches: Int[np.ndarray, "folds steps batch"]
    held_out: list[Indices]  # of each fold
    batch_size: int  # of the held-out batches
    max_bytes: int | None
    progress: Progress


class RateGroup(NamedTuple):
    """Rates whose candidates are trained by one program."""

    indices: list[int]
    rates: Sequence[float]
    make_optimizer: MakeOptimizer


class RankGroup(NamedTuple):
    """Ranks whose candidates are padded to one shape."""

    indices: list[int]
    ranks: Sequence[int]

    @property
    def largest(self) -> int:
        """The index of the largest rank."""
        return self.indices[int(np.argmax(self.ranks))]


class _Programs(NamedTuple):
    init: Any  # compiled, Inputs -> CandidateState
    step: Any  # compiled, (CandidateState, Inputs, index) -> CandidateState
    measure: Any  # jitted, (trainable, Inputs, folds, index) -> errors
    num_bytes: int  # of a step: arguments, results and temporary arrays


def run_rank_group(
    trials: Trials,
    trees: RankTrees,
    rank_group: RankGroup,
    rate_groups: Sequence[RateGroup],
    errors: Float[np.ndarray, "ranks rates folds"],
) -> None:
    """Train and measure all candidates of some ranks; write their errors in place."""
    num_folds = len(trials.held_out)
    num_rates = max(len(group.indices) for group in rate_groups)
    grid = (len(rank_group.indices), num_rates, num_folds)
    describe = functools.partial(_describe_inputs, trials, trees, rank_group)

    # The programs of further groups differ by a constant, the rate, only.
    first, *others = rate_groups
    grid, programs = _compile_to_fit(trials, describe, first, grid)
    inputs, layout = describe(grid)
    compiled = [programs]
    compiled += [_compile(trials, inputs, layout, group, grid) for group in others]

    rank = max(rank_group.ranks)
    for ranks in _list_chunks(len(rank_group.indices), grid[0]):
        stacked = trees.stack([rank_group.indices[i] for i in ranks], rank, layout)
        for group, programs in zip(rate_groups, compiled, strict=True):
            for rates in _list_chunks(len(group.indices), grid[1]):
                inputs = _make_inputs(trials, stacked, rank_group, group, ranks, rates)
                for folds in _list_chunks(num_folds, grid[2]):
                    values = _run_chunk(trials, programs, inputs, folds)
                    own = [rank_group.indices[i] for i in ranks]
                    at = np.ix_(own, [group.indices[j] for j in rates], folds)
                    errors[at] = values


def _make_inputs(
    trials: Trials,
    stacked: StackedTrees,
    rank_group: RankGroup,
    rate_group: RateGroup,
    ranks: list[int],
    rates: list[int],
) -> Inputs:
    own_ranks = jnp.asarray([rank_group.ranks[i] for i in ranks], jnp.int32)
    # A stack of weakly typed numbers is weakly typed: an optimiser then computes in
    # the dtypes of the trained arrays, as it does with a Python float.
    own_rates = jnp.stack([jnp.asarray(rate_group.rates[j]) for j in rates])
    return Inputs(stacked, own_ranks, own_rates, trials.examples)


def _describe_inputs(
    trials: Trials, trees: RankTrees, rank_group: RankGroup, grid: Grid
) -> tuple[Inputs, FrozenLayout]:
    """Return abstract inputs of a chunk, and the layout of its frozen trees."""
    rank = max(rank_group.ranks)
    stacked, layout = trees.describe(rank_group.largest, rank, grid[0])
    rates = jnp.stack([jnp.asarray(1.0)] * grid[1])
    ranks = jnp.zeros(grid[0], jnp.int32)
    return Inputs(stacked, ranks, rates, trials.examples), layout


def _compile_to_fit(
    trials: Trials, describe: Any, group: RateGroup, grid: Grid
) -> tuple[Grid, _Programs]:
    """Return the largest chunk that is found to fit, and its programs."""
    while True:
        inputs, layout = describe(grid)
        programs = _compile(trials, inputs, layout, group, grid)
        limit = trials.max_bytes
        if limit is None or programs.num_bytes <= limit:
            return grid, programs

        num_candidates = int(np.prod(grid))
        if num_candidates == 1:
            raise ValueError(
                f"`max_bytes` must be at least {programs.num_bytes}, the memory of one "
                f"candidate, got {limit}. Choose a larger value or a smaller "
                "batch_size."
            )
        fitting = num_candidates * limit // programs.num_bytes
        grid = _shrink(grid, max(1, min(fitting, num_candidates - 1)))


def _shrink(grid: Grid, num_candidates: int) -> Grid:
    """Return a smaller grid: first fewer ranks, because only they stack bases."""
    ranks, rates, folds = grid
    ranks = max(1, min(ranks, num_candidates // (rates * folds)))
    rates = max(1, min(rates, num_candidates // (ranks * folds)))
    folds = max(1, min(folds, num_candidates // (ranks * rates)))
    return ranks, rates, folds


def _compile(
    trials: Trials, inputs: Inputs, layout: FrozenLayout, group: RateGroup, grid: Grid
) -> _Programs:
    init = jax.jit(
        functools.partial(init_candidates, group.make_optimizer, num_folds=grid[2])
    )
    step = jax.jit(
        functools.partial(step_candidates, trials.loss, group.make_optimizer, layout),
        donate_argnums=0,
    )
    measure = jax.jit(
        functools.partial(
            measure_candidates, trials.metric, layout, batch_size=trials.batch_size
        )
    )

    state = jax.eval_shape(init, inputs)
    index = jax.ShapeDtypeStruct((grid[2], trials.batches.shape[2]), jnp.int32)
    compiled = step.lower(state, inputs, index).compile()
    peak_bytes, _ = read_memory(compiled)
    return _Programs(init, compiled, measure, peak_bytes or 0)


def _run_chunk(
    trials: Trials, programs: _Programs, inputs: Inputs, folds: list[int]
) -> Float[np.ndarray, "ranks rates folds"]:
    state: CandidateState = programs.init(inputs)
    for index in trials.batches[folds].swapaxes(0, 1):
        state = programs.step(state, inputs, index)
        trials.progress.count()

    is_finite = np.asarray(state.is_finite)
    errors = np.full(is_finite.shape, np.inf)
    # Folds of equal size share a program.
    sizes = np.asarray([len(trials.held_out[fold]) for fold in folds])
    for size in np.unique(sizes):
        own = np.flatnonzero(sizes == size).astype(np.int32)
        held_out = [trials.held_out[folds[i]] for i in own]
        index = np.stack(held_out).astype(np.int32)
        errors[:, :, own] = programs.measure(state.trainable, inputs, own, index)
    return np.where(is_finite & np.isfinite(errors), errors, np.inf)


def _list_chunks(count: int, size: int) -> Iterator[list[int]]:
    """Yield chunks of one size; the last one repeats its last member if need be."""
    for start in range(0, count, size):
        yield [min(i, count - 1) for i in range(start, start + size)]
