"""Targets of the truncated SVD: time, error, memory, compile time."""

from benchmarks.report.targets.measures import (
    measure_error,
    measure_ratio,
    measure_worst,
)
from benchmarks.report.targets.target import Target
from benchmarks.run.cases import Case
from benchmarks.suites.factorization.cases import SEEDS_CASES, SPLIT_CASE
from jlora.factorization.passes import plan_iteration

_SMALL = (
    *(Case("llama-3.2-1b", "attention", rank) for rank in (16, 64, 128)),
    Case("llama-3.2-1b", "attention", 64, "flat"),
    Case("llama-3.2-1b", "attention", 64, "exponential"),
    Case("gpt-2-medium", "output", 16, layers=8),
    Case("gpt-2-medium", "output", 64, layers=8),
    Case("minilm-l6", "attention", 16, "pretrained", layers=6),
    Case("minilm-l6", "mlp up", 16, "pretrained", layers=6),
)
_LARGE = (
    *(Case("llama-2-7b", "attention", rank) for rank in (16, 64, 128)),
    Case("llama-2-7b", "attention", 64, "flat"),
    Case("llama-2-7b", "attention", 64, "exponential"),
    *(Case("llama-2-7b", "mlp up", rank) for rank in (16, 64, 128)),
)
_CASES = (*_SMALL, *_LARGE)
SVD_CASES = [case.name for case in _CASES]
_SPIKED_CASES = [case.name for case in _CASES if case.spectrum == "spiked"]
# The optimum of these is rounding, and an excess relative to it says nothing.
_DECAYING_CASES = [case.name for case in _CASES if case.spectrum == "exponential"]
_OTHER_CASES = [name for name in SVD_CASES if name not in _DECAYING_CASES]
_SEEDS_CASES = [case.name for case in SEEDS_CASES]

_OURS = "jlora krylov"
_FEW, _MANY = "torch.svd_lowrank niter 4", "torch.svd_lowrank niter 16"
_SQUARE = Case("llama-3.2-1b", "attention", 64).name
_BATCH = Case("llama-2-7b", "attention", 64, layers=8).name
_SPLIT = ("factorization", "split of the time", SPLIT_CASE.name)


def _name_svd(name, *implementation):
    return ("factorization", "truncated svd", name, *implementation)


def _measure_against(peer, names=SVD_CASES):
    return measure_worst(
        names, lambda name: measure_ratio(_name_svd(name), _OURS, peer)
    )


def _measure_at_energy(name, peer):
    """Return the measure of our time over a peer's at equal captured energy.

    Our time is the shortest among the settings that capture the peer's energy.
    """

    def measure(found):
        record = found.get(_name_svd(name, peer))
        if record is None:
            return None

        # Energies of float32 results are only known to their rounding.
        wanted = record["errors"]["energy"] - 1e-7
        ratios = []
        for key, ours in found.items():
            is_ours = key[:3] == _name_svd(name) and key[3].startswith(_OURS)
            if is_ours and ours["errors"]["energy"] >= wanted:
                ratios.append(measure_ratio(_name_svd(name), key[3], peer)(found))
        return min(ratios, default=None)

    return measure


def _measure_error_ratio(name):
    """Return the measure of the excess error of svd_lowrank niter 16 over ours."""

    def measure(found):
        peer = measure_error(_name_svd(name, _MANY))(found)
        ours = measure_error(_name_svd(name, _OURS))(found)
        return None if None in (peer, ours) else peer / max(ours, 1e-12)

    return measure


def _measure_least(name, kinds):
    """Return the measure of the least of some errors at the default setting."""

    def measure(found):
        key = _name_svd(name, _OURS)
        values = [measure_error(key, kind)(found) for kind in kinds]
        return None if None in values else min(values)

    return measure


def _measure_temporaries(found):
    """Return the temporary memory of a decomposition over (m + n) * basis width."""
    record = found.get((*_SPLIT, _OURS))
    if record is None:
        return None

    m, n, rank = (record["case"][field] for field in ("m", "n", "rank"))
    sizes = plan_iteration((m, n), rank)
    basis_width = sizes.block_size * (sizes.num_passes // 2)
    num_values = record["temporary_bytes"] / 4  # float32
    return num_values / ((m + n) * basis_width)


def _measure_compile(name):
    """Return the measure of the time to lower and compile the default setting."""

    def measure(found):
        record = found.get(_name_svd(name, _OURS))
        if record is None or record["compile_ms"] is None:
            return None
        return record["lower_ms"] + record["compile_ms"]

    return measure


def _measure_compile_for(target):
    case = f"{_BATCH}, for {target}"
    key = ("factorization", "compile ahead of time", case, _OURS)
    return measure_error(key, "compile ms")


_TIMES = (
    Target(
        3,
        "time over svd_lowrank niter 16 at its energy, worst case",
        0.35,
        measure_worst(SVD_CASES, lambda name: _measure_at_energy(name, _MANY)),
    ),
    Target(
        3,
        "time over svd_lowrank niter 16, default, worst case",
        0.5,
        _measure_against(_MANY),
    ),
    Target(
        3,
        "excess error of svd_lowrank niter 16 over ours, spiked, least",
        4,
        measure_worst(_SPIKED_CASES, _measure_error_ratio, min),
        at_least=True,
    ),
    Target(
        3,
        "time over svd_lowrank niter 4 at its energy, worst case",
        0.8,
        measure_worst(SVD_CASES, lambda name: _measure_at_energy(name, _FEW)),
    ),
    Target(
        3,
        "time over sklearn randomized_svd, worst case",
        0.25,
        _measure_against("sklearn randomized_svd"),
    ),
    Target(
        3,
        "time over jnp.linalg.svd at 2048x2048",
        0.05,
        _measure_against("jnp.linalg.svd", [_SQUARE]),
    ),
)
_ERRORS = (
    Target(
        3,
        "excess error, default, worst case",
        1e-4,
        measure_worst(
            _OTHER_CASES, lambda name: _measure_least(name, ["excess error"])
        ),
    ),
    Target(
        3,
        "excess error, default, decaying spectra, rounding aside",
        1e-6,
        measure_worst(
            _DECAYING_CASES,
            lambda name: _measure_least(name, ["excess error", "excess over norm"]),
        ),
    ),
    Target(
        3,
        "excess error, worst of 20 seeds",
        1e-4,
        measure_worst(
            _SEEDS_CASES,
            lambda name: measure_error(
                ("factorization", "twenty seeds", name, _OURS), "worst excess error"
            ),
        ),
    ),
)
_COSTS = (
    Target(
        3,
        "part of the time in products with a, 4096x4096 rank 64",
        0.5,
        measure_ratio(_SPLIT, "products alone", _OURS),
        at_least=True,
    ),
    Target(3, "temporary memory over (m + n) * basis width", 3, _measure_temporaries),
    Target(
        3,
        "compile of one shape on a CPU, ms, worst case",
        3000,
        measure_worst(SVD_CASES, _measure_compile),
    ),
    Target(
        3,
        "compile for an H200, batch of 8 at 4096x4096, ms",
        10_000,
        _measure_compile_for("H200"),
    ),
    Target(
        3,
        "compile for a TPU v5e, batch of 8 at 4096x4096, ms",
        40_000,
        _measure_compile_for("TPU v5e"),
    ),
)
TARGETS = (*_TIMES, *_ERRORS, *_COSTS)
