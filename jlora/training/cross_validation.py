"""The rank and learning rate that predict held-out examples: `cross_validate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from jlora import _checks
from jlora._progress import Progress
from jlora._types import PRNGKey, Tree
from jlora.adaptation.plan import Plan, make_plan
from jlora.adaptation.rule import Rule
from jlora.adaptation.rule_matches import check_rules
from jlora.training.candidate_grids import (
    RankGroup,
    RateGroup,
    Trials,
    run_rank_group,
)
from jlora.training.candidates import MakeOptimizer, take_examples
from jlora.training.folds import assign_folds, draw_batches
from jlora.training.optimizer_probes import can_pad, can_trace_rate
from jlora.training.rank_trees import RankTrees
from jlora.training.rank_trials import RankTrials
from jlora.training.steps import Loss, init_train
from jlora.training.trial_checks import (
    check_any_finite,
    check_batch_size,
    check_examples,
    check_folds,
    check_make_optimizer,
    check_ranks,
    check_rates,
    check_scalar_loss,
)


def cross_validate(
    loss: Loss,
    params: Tree,
    rules: Rule | Sequence[Rule],
    examples: Tree,
    *,
    ranks: Sequence[int],
    rates: Sequence[float],
    num_steps: int,
    key: PRNGKey,
    folds: int = 5,
    optimizer: MakeOptimizer = optax.adam,
    batch_size: int | None = None,
    metric: Loss | None = None,
    also_train: str | None = None,
    data: Tree | None = None,
    max_bytes: int | None = None,
    progress: bool | None = None,
) -> RankTrials:
    """Return the held-out error of each rank and learning rate, and the rank to use.

    The examples are divided at random into folds. For each rank, rate and fold, a
    candidate is adapted and trained on the other folds, and its error is measured on
    its own fold. The rank to use is the smallest one within one standard error of the
    smallest mean error. All candidates are trained together in one program: factors are
    padded to the largest rank, and the padding stays zero. Each candidate gets the
    numbers, up to rounding, that it gets if it is trained by `fit` with no other.

    Args:
        loss: loss(params, batch) -> scalar, a mean over the examples; as for `fit`.
        params: pytree of weights, as for `make_plan`.
        rules: one `Rule` or a sequence. Each rank to try takes the place of the rank
            of all rules.
        examples: pytree of arrays with a common first axis, the examples. A batch is
            the same pytree with fewer of them.
        ranks: static, different integers ≥ 1.
        rates: static, different learning rates > 0.
        num_steps: static, training steps of each candidate.
        key: one typed PRNG key, consumed. The candidates of a fold see the same
            batches, and those of a rank start from the same factors.
        folds: static, from 2 to the number of examples.
        optimizer: static, function from a learning rate to an
            optax.GradientTransformation. To set other options or a schedule, write
            `lambda rate: optax.adamw(rate, weight_decay=0.1)`.
        batch_size: static, examples of a training batch, and the most of a held-out
            batch. None: all training examples, or one fewer in a fold that has one
            more than another.
        metric: metric(params, batch) -> scalar, the error to be small on held-out
            examples. None: the loss.
        also_train: as in `split_trainable`.
        data: as in `adapt`, for initializers that need it. None: none.
        max_bytes: static, the most memory of the program of a step: the candidates are
            trained in chunks that fit. None: no limit on a CPU, half of the device's
            free memory elsewhere.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.

    Returns:
        `RankTrials`. A candidate with a loss of NaN or Inf at any step has the error
        inf, and changes no other.

    Raises:
        TypeError: arguments of the wrong kind; a loss that is no scalar.
        ValueError: a rank above the largest of a weight (with the path), arrays of
            examples of different lengths (with the paths), a number outside the range
            above, a `max_bytes` too small for one candidate, no candidate with finite
            errors.

    Cost: `adapt` once for each rank, then num_steps steps of all candidates at the
        largest rank. One program is compiled. An optimiser whose update of a factor
        depends on its shape or on means over its entries (`optax.contrib.muon`,
        `optax.adafactor`) is found by a test run, and its ranks get a program each. An
        optimiser that cannot be built from a traced rate
        (`optax.warmup_cosine_decay_schedule`) gets a program for each rate.
        Memory: trained arrays, optimiser state and activations of all candidates of a
        chunk. A base that the initializer leaves unchanged ("lora") is stored once.
        Others ("pissa") are stored once for each rank of a chunk, and twice while they
        are stacked.

    Accuracy: errors agree with candidates trained by `fit` to 2e-5 in float32 after a
        few steps. An optimiser that branches on values, such as the line search of
        `optax.lbfgs`, may accept another point because of rounding: then single
        candidates differ (by up to 21 % in a test) in float32, and agree in float64.

    Gradients: not differentiable.

    Source: Breiman, Friedman, Olshen, Stone, "Classification and regression trees",
        1984, section 3.4.3, for the rule of one standard error.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> keys = jax.random.split(jax.random.key(0), 5)
        >>> w = jax.random.normal(keys[0], (8, 6))
        >>> delta = jnp.outer(*(jnp.ones(n) for n in w.shape))  # of rank one
        >>> x = jax.random.normal(keys[1], (60, 8))
        >>> y = x @ (w + delta) + 0.1 * jax.random.normal(keys[2], (60, 6))
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> rule = jlora.Rule("w", 1, init="lora", trainable="uv")
        >>> trials = jlora.training.cross_validate(
        ...     loss, {"w": w}, rule, (x, y), ranks=[1, 2, 4], rates=[0.01, 0.03],
        ...     folds=3, num_steps=200, key=keys[3], progress=False)
        >>> trials.errors.shape, trials.rank
        ((3, 2, 3), 1)
    """
    ranks, rates = check_ranks(ranks), check_rates(rates)
    examples, num_examples = check_examples(examples)
    folds = check_folds(folds, num_examples)
    num_training = num_examples - -(-num_examples // folds)
    batch_size = check_batch_size(batch_size, num_training)
    num_steps = _checks.check_integer(num_steps, "num_steps")
    check_make_optimizer(optimizer, rates[0])
    if max_bytes is not None:
        max_bytes = _checks.check_integer(max_bytes, "max_bytes")
    _checks.check_key(key)

    # Every rank is checked against every weight before the first is decomposed.
    fold_key, batch_key, adapt_key, probe_key = jax.random.split(key, 4)
    plans = _plan_ranks(params, rules, ranks, data)
    trees = RankTrees(params, plans, key=adapt_key, data=data, also_train=also_train)
    largest = int(np.argmax(ranks))
    batch = take_examples(examples, np.arange(batch_size))
    for function, name in ((loss, "loss"), (metric or loss, "metric")):
        check_scalar_loss(function, name, trees.adapt(largest), batch)
    init_train(trees.adapt(largest), optimizer(rates[0]), also_train=also_train)

    held_out = assign_folds(num_examples, folds, fold_key)
    batches = draw_batches(held_out, batch_size, num_steps, batch_key)
    rate_groups = _group_rates(trees, optimizer, largest, ranks, rates)
    rank_groups = _group_ranks(trees, optimizer, ranks, rates, probe_key)

    errors = np.full((len(ranks), len(rates), folds), np.inf)
    limit = _find_free_bytes() if max_bytes is None else max_bytes
    with Progress("cross_validate", None, enabled=progress) as bar:
        trials = Trials(
            loss, metric or loss, examples, batches, held_out, batch_size, limit, bar
        )
        for group in rank_groups:
            run_rank_group(trials, trees, group, rate_groups, errors)
    check_any_finite(errors)
    return RankTrials(ranks, rates, errors)


def _plan_ranks(
    params: Tree,
    rules: Rule | Sequence[Rule],
    ranks: Sequence[int],
    data: Tree | None,
) -> list[Plan]:
    """Return the plan of each rank, in which it is the rank of every rule."""
    checked = check_rules(rules)
    return [
        make_plan(params, [rule.with_rank(rank) for rule in checked], data=data)
        for rank in ranks
    ]


def _group_rates(
    trees: RankTrees,
    optimizer: MakeOptimizer,
    index: int,
    ranks: Sequence[int],
    rates: Sequence[float],
) -> list[RateGroup]:
    """Return one group of all rates, or a group for each."""
    trainable, frozen = trees.split(index, ranks[index])
    if can_trace_rate(optimizer, trainable, frozen):
        return [RateGroup(list(range(len(rates))), rates, optimizer)]

    def fix_rate(rate: float) -> MakeOptimizer:
        return lambda _: optimizer(rate)

    return [RateGroup([i], [rate], fix_rate(rate)) for i, rate in enumerate(rates)]


def _group_ranks(
    trees: RankTrees,
    optimizer: MakeOptimizer,
    ranks: Sequence[int],
    rates: Sequence[float],
    key: PRNGKey,
) -> list[RankGroup]:
    """Return one group of all ranks, or a group for each."""
    together = RankGroup(list(range(len(ranks))), ranks)
    smallest = int(np.argmin(ranks))
    is_single = len(ranks) == 1
    made = optimizer(rates[0])
    if is_single or can_pad(made, trees, smallest, ranks[smallest], max(ranks), key):
        return [together]
    return [RankGroup([i], [rank]) for i, rank in enumerate(ranks)]


def _find_free_bytes() -> int | None:
    """Return half of the device's free memory, or None if it does not report it."""
    stats: Any = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
