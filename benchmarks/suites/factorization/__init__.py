"""Truncated SVD of weights: jlora at its settings beside its peers.

cases           which matrices are decomposed
truncated_svd   the main comparison, one group for each case
many_seeds      the largest error over twenty seeds at the default setting
pass_counts     the error after each number of passes
time_split      the time of the matrix products, beside the whole
compiled        compile times for accelerators
"""

from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.suites.factorization.cases import (
    CHOICE_CASES,
    SEEDS_CASES,
    SPLIT_CASE,
    list_full_cases,
    list_quick_cases,
)
from benchmarks.suites.factorization.compiled import make_svd_compile_group
from benchmarks.suites.factorization.many_seeds import make_seeds_group
from benchmarks.suites.factorization.pass_counts import make_choice_group
from benchmarks.suites.factorization.time_split import make_split_group
from benchmarks.suites.factorization.truncated_svd import make_group


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        return [
            make_group(case, level_name, platform, with_full=True)
            for case in list_quick_cases()
        ]

    return [
        *_list_svd_groups(level_name, platform),
        make_split_group(SPLIT_CASE),
        *(make_seeds_group(case) for case in SEEDS_CASES),
        *(make_choice_group(case) for case in CHOICE_CASES),
        *(make_svd_compile_group(target) for target in TARGETS),
    ]


def _list_svd_groups(level_name, platform):
    # The full decomposition of a larger matrix takes minutes on a CPU: no contender.
    most = 4096 if platform == "gpu" else 2048
    groups = []
    for case in list_full_cases(platform):
        with_full = max(case.shape) <= most and case.rank == 64
        groups.append(make_group(case, level_name, platform, with_full=with_full))
    return groups
