"""Factors → matrix, in place or not, and factors → activations with their gradients.

layers          the arrays of one layer, and the rows of a result that are checked
merges          w + scale * u @ v, of a whole weight or of some columns
apply_factors   one adapted layer, forward and backward
apply_many      one batch whose rows use many adapters
rounding        a small update to a bfloat16 weight, at each rounding
compiled        a donated merge compiled for accelerators
"""

from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.run.cases import Case
from benchmarks.suites.reconstruction.apply_factors import (
    make_apply_group,
    make_backward_group,
)
from benchmarks.suites.reconstruction.apply_many import make_many_group
from benchmarks.suites.reconstruction.compiled import make_merge_compile_group
from benchmarks.suites.reconstruction.merges import (
    make_columns_group,
    make_reconstruct_group,
)
from benchmarks.suites.reconstruction.rounding import make_rounding_group


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    is_full = level_name == "full"
    if is_full:
        weight, ranks = ("llama-2-7b", "attention"), (8, 16, 32, 64, 128)
        layer = Case("llama-3.2-1b", "attention", 16, "factors", tokens=512)
    else:
        weight, ranks = ("gpt-2-medium", "output"), (16, 64)
        layer = Case("bert-base", "attention", 16, "factors", tokens=128)

    few_tokens = layer._replace(tokens=layer.tokens // 8)
    groups = [
        *_list_reconstruct_groups(weight, ranks),
        make_columns_group(Case(*weight, 16, "factors")),
        make_apply_group(layer),
        make_backward_group(layer),
        make_many_group(layer),
        make_many_group(few_tokens),
        make_rounding_group(),
    ]
    if is_full:
        groups += [make_merge_compile_group(target) for target in TARGETS]
    if is_full and platform == "gpu":
        groups += _list_gpu_groups(weight)
    return groups


def _list_reconstruct_groups(weight, ranks):
    groups = []
    for dtype in ("float32", "bfloat16"):
        for rank in ranks:
            case = Case(*weight, rank, "factors", dtype)
            groups.append(make_reconstruct_group(case, donated=True))
            groups.append(make_reconstruct_group(case, donated=False))
    return groups


def _list_gpu_groups(weight):
    decode, prefill = (
        Case(*weight, 16, "factors", "bfloat16", tokens=tokens) for tokens in (16, 4096)
    )
    return [
        make_apply_group(decode),
        make_apply_group(prefill),
        make_backward_group(prefill),
    ]
