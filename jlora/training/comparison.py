"""Accuracy, forgetting and cost of several trees, in one table: `evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._types import Array, Float, Tree
from jlora.training.batches import to_arrays
from jlora.training.evaluation import TrainingCost, measure_cost
from jlora.training.evaluation_table import Evaluation
from jlora.training.step_cost import StepCost
from jlora.training.steps import TrainState

Metric = Callable[[Tree, Any], Any]  # metric(params, batch) -> scalar


def evaluate(
    trees: Mapping[str, Tree],
    domains: Mapping[str, Iterable[Any]],
    metrics: Mapping[str, Metric],
    *,
    costs: Mapping[str, TrainState | TrainingCost | StepCost] | None = None,
    before: str | None = None,
    old: str | None = None,
    jit: bool = True,
) -> Evaluation:
    """Return accuracy, forgetting and cost of several models as one table.

    It answers three questions about an adaptation: how good is it in each domain, how
    much of the old domain did it forget, and how much did the training cost.

    Args:
        trees: {label: tree of weights}, adapted or plain, such as the model before the
            training, after it, and after full fine-tuning.
        domains: {domain: iterable of batches}. Each is read once, so it may be an
            iterator.
        metrics: {name: metric(params, batch) -> scalar}, each a mean over the examples
            of the batch.
        costs: {label: cost of its training}, from `measure_step` (with time and
            memory), from `measure_cost`, or a `TrainState`. None: no costs.
        before: label of the model before the training. None: the first one.
        old: domain in which forgetting is measured. None: the first one.
        jit: static. False: do not compile the metrics, which then may use NumPy and
            strings.

    Returns:
        `Evaluation`. A metric is the mean over the batches of a domain, each weighted
        by the length of the first axis that its arrays share, or by 1 if they share
        none.

    Raises:
        TypeError: arguments of the wrong kind, or a metric that is no scalar.
        ValueError: a domain without batches, or a label or domain that is not there.

    Cost: one program for each tree and shape of batch, with all metrics in it.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> def error(params, x):
        ...     return jnp.mean(jnp.abs(params * x - 1))
        >>> result = jlora.training.evaluate(
        ...     {"before": 1.0, "after": 0.5},
        ...     {"general": [jnp.ones(3)], "technical": [jnp.full(4, 2.0)]},
        ...     {"error": error}, costs={"after": jlora.training.TrainingCost(1, 8)})
        >>> print(result)
                general error  technical error  forgetting error  trained  optimizer
        before  0              1                0
        after   0.5            0                0.5               1        8 B
    """
    for name, mapping in (("trees", trees), ("domains", domains), ("metrics", metrics)):
        _check_mapping(mapping, name)
    before = _choose(before, trees, "before")
    old = _choose(old, domains, "old")
    sizes = _list_costs(costs, trees)
    for name, metric in metrics.items():
        _check_metric(name, metric)

    run = _make_run(metrics, jit)
    values = np.full((len(trees), len(domains), len(metrics)), np.nan)
    for j, (domain, batches) in enumerate(domains.items()):
        values[:, j] = _evaluate_domain(run, trees, domain, batches)
    names = (tuple(trees), tuple(domains), tuple(metrics))
    return Evaluation(*names, values, sizes, before, old)


def _make_run(metrics: Mapping[str, Metric], jit: bool) -> Callable[[Tree, Any], list]:
    def run(params: Tree, batch: Any) -> list[Array]:
        return [
            _check_value(name, metric(params, batch))
            for name, metric in metrics.items()
        ]

    return jax.jit(run) if jit else run


def _evaluate_domain(
    run: Callable[[Tree, Any], list],
    trees: Mapping[str, Tree],
    domain: str,
    batches: Iterable[Any],
) -> Float[np.ndarray, "labels metrics"]:
    total, weights = 0.0, 0
    for batch in batches:
        batch = to_arrays(batch)
        weight = _count_examples(batch)
        values = [run(tree, batch) for tree in trees.values()]
        total = total + weight * np.asarray(jax.device_get(values), np.float64)
        weights += weight

    if not weights:
        raise ValueError(
            f"`domains` must hold at least one batch for each domain, got none for "
            f"{domain!r}. An iterator can be used only once."
        )
    return np.asarray(total) / weights


def _count_examples(batch: Any) -> int:
    """Return the common length of the first axis of the arrays, or 1."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    lengths = {shape[0] if shape else None for shape in shapes}
    (length, *others) = lengths or {None}
    return length if length and not others else 1


def _check_mapping(mapping: Any, name: str) -> None:
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"`{name}` must be a dict from names, got {type(mapping).__name__}. Give "
            "each member a name for the table."
        )
    if not mapping:
        raise ValueError(f"`{name}` must hold at least one member, got none. Name one.")


def _check_metric(name: str, metric: Any) -> None:
    if not callable(metric):
        raise TypeError(
            f"`metrics` must hold functions of (params, batch), got "
            f"{type(metric).__name__} for {name!r}. Pass one."
        )


def _check_value(name: str, value: Any) -> Array:
    if jnp.shape(value) != ():
        raise TypeError(
            f"`metrics` must return one number each, got shape {jnp.shape(value)} from "
            f"{name!r}. Return the mean over the examples."
        )
    return value


def _choose(name: str | None, mapping: Mapping[str, Any], argument: str) -> str:
    if name is None:
        return next(iter(mapping))
    return _checks.check_choice(name, list(mapping), argument)


def _list_costs(
    costs: Mapping[str, Any] | None, trees: Mapping[str, Tree]
) -> dict[str, TrainingCost | StepCost]:
    """Return {label: cost}, with a train state replaced by its cost."""
    found = {}
    for label, cost in (costs or {}).items():
        _checks.check_choice(label, list(trees), "costs")
        if isinstance(cost, TrainState):
            cost = measure_cost(cost)
        if not isinstance(cost, (TrainingCost, StepCost)):
            raise TypeError(
                "`costs` must hold results of measure_step or measure_cost, or train "
                f"states, got {type(cost).__name__} for {label!r}. Call measure_step."
            )
        found[label] = cost
    return found
