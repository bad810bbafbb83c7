"""Targets of the way back from factors: merges, adapted layers, roundings (part 5)."""

from benchmarks.report.targets.measures import measure_error, measure_ratio
from benchmarks.report.targets.target import Target
from benchmarks.run.cases import Case

_SUITE = "reconstruction"
_OURS = "jlora reconstruct"
_COLUMNS = Case("llama-2-7b", "attention", 16, "factors").name
_ROUNDING = (_SUITE, "rounding", "bfloat16 base of rms 0.02, delta of rms 1e-4")


def _list_merges():
    """Return the targets of merges over plain JAX, donated or not."""
    targets = []
    for dtype in ("float32", "bfloat16"):
        for rank in (8, 16, 32, 64, 128):
            case, bound = f"{dtype}, rank {rank}", 1 / 2.5 if rank <= 16 else 1 / 1.3
            donated = _measure_merge("reconstruct donated", dtype, rank, "jax plain")
            fresh = _measure_merge("reconstruct", dtype, rank, "jax plain")
            name = "merge over plain JAX"
            targets.append(Target(5, f"donated {name}, {case}", bound, donated))
            targets.append(Target(5, f"{name}, {case}", 1.05, fresh))
    return targets


def _make_donated(rank, bound):
    """Return the target of a donated merge over torch's addmm_."""
    measure = _measure_merge("reconstruct donated", "float32", rank, "torch addmm_")
    return Target(5, f"donated merge over torch addmm_, rank {rank}", bound, measure)


def _measure_merge(operation, dtype, rank, peer):
    case = Case("llama-2-7b", "attention", rank, "factors", dtype).name
    return measure_ratio((_SUITE, operation, case), _OURS, peer)


def _measure_step(peer):
    """Return the measure of a layer's forward and backward step over a peer's."""
    problem = (_SUITE, "apply factors backward", _name_layer(512))
    return measure_ratio(problem, "jlora apply_factors", peer)


def _make_many(tokens, bound):
    """Return the target of many adapters over the base without adapters."""
    problem = (_SUITE, "apply many", _name_layer(tokens))
    measure = measure_ratio(problem, "jlora apply_many", "jax base alone")
    return Target(5, f"apply_many over x @ base, {tokens} tokens", bound, measure)


def _name_layer(tokens):
    return Case("llama-3.2-1b", "attention", 16, "factors", tokens=tokens).name


def _make_memory(device, target):
    """Return the target of the temporary memory of a donated bfloat16 merge."""
    name = f"temporary bytes of a donated bfloat16 merge, compiled for {device}"
    key = (_SUITE, "compile ahead of time", target, _OURS)
    return Target(5, name, 0, measure_error(key, "temporary bytes"))


TARGETS = (
    *_list_merges(),
    _make_donated(16, 2.0),
    _make_donated(64, 1.2),
    Target(
        5,
        "64 of 4096 columns over a full reconstruct",
        0.1,
        measure_ratio(
            (_SUITE, "reconstruct columns", _COLUMNS),
            "jlora 64 columns",
            "jlora all columns",
        ),
    ),
    Target(
        5,
        "apply_factors and gradients over x @ base and its input gradient",
        1.1,
        _measure_step("jax base forward and input gradient"),
    ),
    Target(
        5,
        "apply_factors and gradients over the full weight-gradient step",
        0.75,
        _measure_step("jax full weight-gradient step"),
    ),
    _make_many(512, 1.5),
    _make_many(64, 1.7),
    Target(
        5,
        "stochastic rounding, bias in standard errors",
        4,
        measure_error((*_ROUNDING, "stochastic"), "bias in standard errors"),
    ),
    Target(
        5,
        "compensated rounding, relative error of the delta",
        1e-2,
        measure_error((*_ROUNDING, "compensated")),
    ),
    _make_memory("an H200", "H200"),
    _make_memory("a TPU v5e", "TPU v5e"),
)
