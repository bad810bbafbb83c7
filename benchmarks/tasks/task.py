"""`Task`: a pretrained model, data of a new domain, and the questions about both."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Domains of a metric.
NEW, OLD = "new", "old"


class Metric(NamedTuple):
    """A number that is measured after training, on data that nothing was chosen by."""

    name: str  # with its unit
    domain: str  # NEW | OLD
    is_better_higher: bool


class Task(NamedTuple):
    """One adaptation of a pretrained model from an old to a new domain."""

    name: str
    model: str  # in words, for the table
    shift: str  # from the old to the new domain, in words
    params: Any  # pretrained tree of plain arrays
    loss: Callable[[Any, Any], Any]  # loss(params, batch) -> scalar
    # sample(seed): the batches of one training run, NumPy arrays of one shape.
    sample: Callable[[int], Iterable[Any]]
    num_steps: int
    # Error on the validation split of the new domain. Learning rates are chosen by it.
    validate: Callable[[Any], float]
    # {metric name: value} on the test split of the new and of the old domain.
    measure: Callable[[Any], dict[str, float]]
    metrics: tuple[Metric, ...]  # the first one decides
    pattern: str  # of the paths of the adapted weights
    rank: int
    num_columns: int  # of "last columns"
    full_rate: float  # first guess for Adam on all weights of `pattern`
    scaled_rate: float  # first guess for ScaledGD, which depends on the loss
    # Leaves that every method trains in full, such as a new head, by Adam at this rate.
    head: str | None = None
    head_rate: float = 1e-3
    # Second moments of the inputs of the adapted weights, over the training split: the
    # `data` of `jlora.adapt`. None: the task does not measure them.
    measure_moments: Callable[[], Any] | None = None
