"""Targets of the updates of factors (part 4)."""

from benchmarks.report.targets.measures import (
    measure_error,
    measure_ratio,
    measure_time,
)
from benchmarks.report.targets.target import Target
from benchmarks.run.cases import Case

_RESIZED = Case("llama-2-7b", "attention", 32, "factors").name
_COMBINED = Case("llama-2-7b", "mlp up", 16, "factors").name
_EXTENDED = Case("llama-2-7b", "attention", 64, "factors").name
_BUDGET = ("updates", "allocate ranks", "224 layers", "jlora allocate_ranks")


def _list_truncations(name, operation, case, ours):
    """Return the targets of one operation that truncates a product of factors."""
    problem = ("updates", operation, case)
    over_dense = measure_ratio(problem, ours, "torch dense road")
    over_lowrank = measure_ratio(problem, ours, "torch.svd_lowrank niter 4")
    excess = measure_error((*problem, ours))

    return [
        Target(4, f"{name}, time over the dense road", 0.05, over_dense),
        Target(4, f"{name}, time over svd_lowrank of the product", 1.0, over_lowrank),
        Target(4, f"{name}, excess over the optimum", 1e-5, excess),
    ]


TARGETS = (
    *_list_truncations("recompress", "recompress", _RESIZED, "jlora recompress"),
    *_list_truncations(
        "combine", "combine adapters", _COMBINED, "jlora concatenate, recompress"
    ),
    Target(
        4,
        "add_low_rank, time over a fresh randomized_svd",
        0.2,
        measure_ratio(
            ("updates", "add low rank", _EXTENDED),
            "jlora add_low_rank",
            "jlora randomized_svd",
        ),
    ),
    Target(4, "allocate_ranks on 224 layers, ms", 50, measure_time(_BUDGET)),
)
