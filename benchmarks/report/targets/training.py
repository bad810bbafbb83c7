"""Targets of training: a step's time, flops and memory, and the loop (part 10)."""

from benchmarks.report.targets.measures import measure_error, measure_ratio
from benchmarks.report.targets.target import Target
from benchmarks.suites.training import list_groups
from benchmarks.suites.training.fit_loops import (
    BARE,
    DISPATCHES,
    FIT,
    SAVED_OFTEN,
    SAVED_ONCE,
    name_dispatch,
)
from benchmarks.suites.training.rank_trials import ONE_BY_ONE, TOGETHER
from benchmarks.suites.training.step_methods import FULL, PEFT, U_AND_V, V_ONLY

_PROBLEMS = {
    group.operation: (group.suite, group.operation, group.case.name)
    for group in list_groups("full", "cpu")
}
_STEP = _PROBLEMS["training step"]
_FIT = _PROBLEMS["fit overhead"]
_SAVED = _PROBLEMS["fit with checkpoints"]
_DISPATCH = _PROBLEMS["steps per dispatch"]
_TRIALS = _PROBLEMS["cross-validation"]


def _measure_kinds(kind):
    """Return the measure of an error kind of V only over full fine-tuning's."""

    def measure(found):
        ours, full = (
            measure_error((*_STEP, name), kind)(found) for name in (V_ONLY, FULL)
        )
        return None if None in (ours, full) else ours / full

    return measure


def _measure_state_error(found):
    """Return how far the size of Adam's state is from two of each trained array."""
    kind = "optimizer state over trained parameters"
    size = measure_error((*_STEP, V_ONLY), kind)(found)
    return None if size is None else abs(size - 2)


_MANY, _ONE = map(name_dispatch, DISPATCHES)
_OVER = {
    FULL: ("full fine-tuning", 0.75),
    U_AND_V: ("U and V", 1.0),
    PEFT: ("peft and torch", 0.9),
}

TARGETS = (
    *(
        Target(
            10,
            f"V-only step, time over {words}",
            bound,
            measure_ratio(_STEP, V_ONLY, name),
        )
        for name, (words, bound) in _OVER.items()
    ),
    Target(
        10,
        "V-only step, compiled flops over full fine-tuning",
        1.0,
        _measure_kinds("flops"),
    ),
    Target(
        10,
        "V-only step, peak bytes over full fine-tuning",
        0.7,
        _measure_kinds("peak bytes"),
    ),
    Target(
        10,
        "V-only step, optimiser state over trained parameters, difference from 2",
        0,
        _measure_state_error,
    ),
    Target(
        10,
        "fit over a bare loop of the same step",
        1.03,
        measure_ratio(_FIT, FIT, BARE),
    ),
    Target(
        10,
        "fit, a checkpoint every 100 steps over one at the end",
        1.03,
        measure_ratio(_SAVED, SAVED_OFTEN, SAVED_ONCE),
    ),
    Target(
        10,
        f"fit, time of 1 step per dispatch over {DISPATCHES[0]}",
        2.0,
        measure_ratio(_DISPATCH, _ONE, _MANY),
        at_least=True,
    ),
    Target(
        10,
        "cross-validation, time one by one over together",
        1.5,
        measure_ratio(_TRIALS, ONE_BY_ONE, TOGETHER),
        at_least=True,
    ),
)
