"""Targets of jobs on checkpoints: time, error, peak memory (part 9)."""

from benchmarks.report.targets.measures import (
    measure_error,
    measure_ratio,
    measure_time,
)
from benchmarks.report.targets.target import Target
from benchmarks.suites.checkpoints import list_groups

_SECONDS = 1e-3  # in one ms
_OURS = "jlora extract_checkpoint"
_LOWRANK = "torch.svd_lowrank"
_DENSE_LAYERS = 32  # that the resized adapter has, and the dense road has one


def _name_problems():
    """Return {operation: its problems of the full level, in order}."""
    problems = {}
    for group in list_groups("full", "cpu"):
        problem = (group.suite, group.operation, group.case.name)
        problems.setdefault(group.operation, []).append((problem, group))
    return problems


_PROBLEMS = _name_problems()
((_OPEN, _),) = _PROBLEMS["open checkpoint"]
(_EXTRACT, _), (_EXTRACT_ONE_LAYER, _), *_ = _PROBLEMS["extract adapter"]
((_MERGE, _),) = _PROBLEMS["merge adapter"]
(_RESIZE, _), (_RESIZE_ONE_LAYER, _) = _PROBLEMS["resize adapter"]
((_MEMORY, _JOBS),) = _PROBLEMS["peak memory"]


def _measure_over_dense(found):
    """Return the time of all layers over the dense road's, of one layer times 32."""
    ours = measure_time((*_RESIZE, "jlora resize_adapter"))(found)
    dense = measure_time((*_RESIZE_ONE_LAYER, "torch dense road"))(found)
    return None if None in (ours, dense) else ours / (_DENSE_LAYERS * dense)


def _measure_shortfalls(found):
    ours, peer = (measure_error((*_EXTRACT, name))(found) for name in (_OURS, _LOWRANK))
    return None if None in (ours, peer) else ours / peer


def _list_memory_targets():
    return [
        Target(
            9,
            f"{contender.name.removeprefix('jlora ')}, peak anonymous memory, GiB",
            1.0,
            measure_error((*_MEMORY, contender.name)),
        )
        for contender in _JOBS.contenders
    ]


TARGETS = (
    Target(
        9,
        "open 10,000 tensors, seconds",
        0.3,
        measure_time((*_OPEN, "jlora open_checkpoint"), _SECONDS),
    ),
    Target(
        9,
        "extract, time over svd_lowrank niter 4",
        0.5,
        measure_ratio(_EXTRACT, _OURS, _LOWRANK),
    ),
    Target(
        9,
        "extract, time over the full SVD of each matrix",
        0.1,
        measure_ratio(_EXTRACT_ONE_LAYER, _OURS, "torch.linalg.svd"),
    ),
    Target(
        9,
        "extract, energy short of the best, over svd_lowrank niter 4",
        1.0,
        _measure_shortfalls,
    ),
    Target(
        9,
        "merge, time of a copy of the files over ours",
        0.6,
        measure_ratio(_MERGE, "copy of the files", "jlora merge_checkpoint"),
        at_least=True,
    ),
    Target(
        9,
        "merge, wrong elements",
        0,
        measure_error((*_MERGE, "jlora merge_checkpoint")),
    ),
    Target(
        9,
        "resize 224 modules, time over the dense road",
        1 / 20,
        _measure_over_dense,
    ),
    Target(
        9,
        "resize 224 modules, excess error, worst module",
        1e-5,
        measure_error((*_RESIZE, "jlora resize_adapter")),
    ),
    *_list_memory_targets(),
)
