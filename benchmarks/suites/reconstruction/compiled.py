"""A donated merge compiled for an accelerator."""

from benchmarks.run.cases import WholeCase
from benchmarks.run.compiled import make_compile_group
from benchmarks.suites.reconstruction.layers import SUITE


def make_merge_compile_group(target):
    """Return the group that compiles a merge for a target; no such device is needed."""
    return make_compile_group(
        SUITE,
        WholeCase(target),
        target,
        "reconstruct bfloat16, rank 16",
        "jlora reconstruct",
        "4096×4096 bfloat16, rank 16, donated",
        ("temporary_bytes", "alias_bytes", "num_kernels", "compile_ms"),
    )
