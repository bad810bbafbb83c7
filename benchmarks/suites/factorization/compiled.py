"""The compile time of a batch of decompositions for an accelerator."""

from benchmarks.run.cases import Case, NamedCase
from benchmarks.run.compiled import make_compile_group

SUITE = "factorization"


def make_svd_compile_group(target):
    """Return the group that compiles a batch for a target; no such device is needed."""
    fields = Case("llama-2-7b", "attention", 64, layers=8)
    case = NamedCase(f"{fields.name}, for {target}", fields.shape, fields)
    return make_compile_group(
        SUITE,
        case,
        target,
        "randomized_svd float32",
        "jlora krylov",
        "all defaults",
        ("compile_ms", "lower_ms", "temporary_bytes"),
    )
