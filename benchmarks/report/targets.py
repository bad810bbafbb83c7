"""Every figure that was asked for, each against its bar, read from the newest records."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.report.statistics import (
    find_error,
    find_time,
    is_measured,
    ratio_of_medians,
)
from benchmarks.run.cases import Case
from benchmarks.suites.factorization.defaults import SEEDS_CASES, SPLIT_CASE
from jlora.factorization.passes import plan_iteration

LARGE = [
    *(Case("llama-2-7b", "attention", rank) for rank in (16, 64, 128)),
    *(
        Case("llama-2-7b", "attention", 64, spectrum)
        for spectrum in ("flat", "exponential")
    ),
    *(Case("llama-2-7b", "mlp up", rank) for rank in (16, 64, 128)),
]
SMALL = [
    *(Case("llama-3.2-1b", "attention", rank) for rank in (16, 64, 128)),
    *(
        Case("llama-3.2-1b", "attention", 64, spectrum)
        for spectrum in ("flat", "exponential")
    ),
    *(Case("gpt-2-medium", "output", rank, layers=8) for rank in (16, 64)),
    *(
        Case("minilm-l6", layer, 16, "pretrained", layers=6)
        for layer in ("attention", "mlp up")
    ),
]
SVD_CASES = [case.name for case in (*SMALL, *LARGE)]
SPIKED_CASES = [case.name for case in (*SMALL, *LARGE) if case.spectrum == "spiked"]
# The optimum of these is rounding, and an excess relative to it says nothing.
DECAYING_CASES = [
    case.name for case in (*SMALL, *LARGE) if case.spectrum == "exponential"
]
_OURS = "jlora krylov"


class Worst(NamedTuple):
    """The worst value over some cases, and in how many of them there was none."""

    value: float | None
    num_missing: int
    num_cases: int


class Bar(NamedTuple):
    """One figure: `measure` gives its value from {key: record}, or None where one is missing.

    Over several cases it gives a `Worst`.
    """

    part: int
    name: str
    bound: float
    measure: Callable[[dict], float | Worst | None]
    at_least: bool = False


def evaluate_bars(records):
    """Return one line a figure: `name: value (bar) met`, or `... missed`; none is left out."""
    found = {
        (
            record["suite"],
            record["operation"],
            record["case"]["name"],
            record["implementation"],
        ): record
        for record in records
        if is_measured(record)
    }
    return [_format_bar(bar, bar.measure(found)) for bar in list_bars()]


def list_bars():
    """Return the `Bar`s of all parts, in order."""
    return [
        *_package_bars(),
        *_svd_bars(),
        *_update_bars(),
        *_reconstruction_bars(),
        *_adaptation_bars(),
    ]


def _format_bar(bar, value):
    value, num_missing, num_cases = (
        value if isinstance(value, Worst) else Worst(value, 0, 1)
    )
    relation = "at least" if bar.at_least else "at most"
    name, limit = f"part {bar.part}, {bar.name}", f"({relation} {bar.bound:g})"
    if value is None:
        return f"{name}: no record {limit} missed"
    met = value >= bar.bound if bar.at_least else value <= bar.bound
    missing = (
        f"; {num_missing} of {num_cases} cases have no record" if num_missing else ""
    )
    return f"{name}: {value:.3g} {limit} {'met' if met and not missing else 'missed'}{missing}"


def _package_bars():
    whole = "a fresh process"
    return [
        Bar(
            1,
            "import jlora over import jax, optax",
            1.1,
            lambda found: _ratio(
                found, ("package", "import", whole), "import jlora", "import jax, optax"
            ),
        ),
        Bar(
            1,
            "jlora demo, seconds",
            180,
            lambda found: _median(
                found, ("package", "demo", whole, "jlora demo"), 1e-3
            ),
        ),
        Bar(
            1,
            "jlora demo, loss of the reloaded weights, difference",
            1e-5,
            lambda found: _error(
                found,
                ("package", "demo", whole, "jlora demo"),
                "reloaded loss difference",
            ),
        ),
        Bar(
            1,
            "jlora demo, bits per byte gained by V only",
            0.1,
            _measure_demo_gain,
            at_least=True,
        ),
        Bar(
            2,
            "run --quick of everything, seconds",
            360,
            lambda found: _median(
                found, ("package", "all suites", "quick", "benchmarks"), 1e-3
            ),
        ),
        Bar(
            2,
            "run --full of everything, seconds",
            3600,
            lambda found: _median(
                found, ("package", "all suites", "full", "benchmarks"), 1e-3
            ),
        ),
        Bar(
            2,
            "MiniLM embeddings, difference from transformers",
            1e-5,
            lambda found: _error(
                found,
                ("adaptation", "embed sentences", "MiniLM-L6", "jlora, plain weights"),
                "difference",
            ),
        ),
    ]


def _measure_demo_gain(found):
    key = ("package", "demo", "a fresh process", "jlora demo")
    before, after = (
        _error(found, key, name) for name in ("no adaptation", "V only, from the SVD")
    )
    return None if before is None or after is None else before - after


def _svd_bars():
    def against(peer, ours, cases=SVD_CASES):
        return lambda found: _worst(
            cases,
            lambda name: _ratio(
                found, ("factorization", "truncated svd", name), ours, peer
            ),
        )

    def excess(cases, kinds=("excess error",)):
        return lambda found: _worst(
            cases, lambda name: _measure_excess(found, name, kinds)
        )

    square = Case("llama-3.2-1b", "attention", 64).name
    large = ("factorization", "split of the time", SPLIT_CASE.name)
    batch = Case("llama-2-7b", "attention", 64, layers=8).name
    return [
        Bar(
            3,
            "time over svd_lowrank niter 16 at its energy, worst case",
            0.35,
            lambda found: _worst(
                SVD_CASES,
                lambda name: _ratio_at_energy(
                    found, name, "torch.svd_lowrank niter 16"
                ),
            ),
        ),
        Bar(
            3,
            "time over svd_lowrank niter 16, default, worst case",
            0.5,
            against("torch.svd_lowrank niter 16", _OURS),
        ),
        Bar(
            3,
            "excess error of svd_lowrank niter 16 over ours, spiked, least",
            4,
            lambda found: _least(SPIKED_CASES, lambda name: _excess_ratio(found, name)),
            at_least=True,
        ),
        Bar(
            3,
            "time over svd_lowrank niter 4 at its energy, worst case",
            0.8,
            lambda found: _worst(
                SVD_CASES,
                lambda name: _ratio_at_energy(found, name, "torch.svd_lowrank niter 4"),
            ),
        ),
        Bar(
            3,
            "time over sklearn randomized_svd, worst case",
            0.25,
            against("sklearn randomized_svd", _OURS),
        ),
        Bar(
            3,
            "time over jnp.linalg.svd at 2048x2048",
            0.05,
            against("jnp.linalg.svd", _OURS, [square]),
        ),
        Bar(
            3,
            "excess error, default, worst case",
            1e-4,
            excess([name for name in SVD_CASES if name not in DECAYING_CASES]),
        ),
        Bar(
            3,
            "excess error, default, decaying spectra, rounding aside",
            1e-6,
            excess(DECAYING_CASES, ("excess error", "excess over norm")),
        ),
        Bar(
            3,
            "excess error, worst of 20 seeds",
            1e-4,
            lambda found: _worst(
                [case.name for case in SEEDS_CASES],
                lambda name: _error(
                    found,
                    ("factorization", "twenty seeds", name, _OURS),
                    "worst excess error",
                ),
            ),
        ),
        Bar(
            3,
            "part of the time in products with a, 4096x4096 rank 64",
            0.5,
            lambda found: _ratio(found, large, "products alone", _OURS),
            at_least=True,
        ),
        Bar(
            3,
            "temporary memory over (m + n) * basis width",
            3,
            lambda found: _measure_temporaries(found, (*large, _OURS)),
        ),
        Bar(
            3,
            "compile of one shape on a CPU, ms, worst case",
            3000,
            lambda found: _worst(SVD_CASES, lambda name: _compile_ms(found, name)),
        ),
        Bar(
            3,
            "compile for an H200, batch of 8 at 4096x4096, ms",
            10_000,
            lambda found: _error(
                found,
                ("factorization", "compile ahead of time", f"{batch}, for H200", _OURS),
                "compile ms",
            ),
        ),
        Bar(
            3,
            "compile for a TPU v5e, batch of 8 at 4096x4096, ms",
            40_000,
            lambda found: _error(
                found,
                (
                    "factorization",
                    "compile ahead of time",
                    f"{batch}, for TPU v5e",
                    _OURS,
                ),
                "compile ms",
            ),
        ),
    ]


def _update_bars():
    resize = (
        "updates",
        "recompress",
        Case("llama-2-7b", "attention", 32, "factors").name,
    )
    combine = (
        "updates",
        "combine adapters",
        Case("llama-2-7b", "mlp up", 16, "factors").name,
    )
    brand = (
        "updates",
        "add low rank",
        Case("llama-2-7b", "attention", 64, "factors").name,
    )
    bars = []
    for name, key, ours in (
        ("recompress", resize, "jlora recompress"),
        ("combine", combine, "jlora concatenate, recompress"),
    ):
        bars += [
            Bar(
                4,
                f"{name}, time over the dense road",
                0.05,
                lambda found, key=key, ours=ours: _ratio(
                    found, key, ours, "torch dense road"
                ),
            ),
            Bar(
                4,
                f"{name}, time over svd_lowrank of the product",
                1.0,
                lambda found, key=key, ours=ours: _ratio(
                    found, key, ours, "torch.svd_lowrank niter 4"
                ),
            ),
            Bar(
                4,
                f"{name}, excess over the optimum",
                1e-5,
                lambda found, key=key, ours=ours: _first_error(found, (*key, ours)),
            ),
        ]
    return [
        *bars,
        Bar(
            4,
            "add_low_rank, time over a fresh randomized_svd",
            0.2,
            lambda found: _ratio(
                found, brand, "jlora add_low_rank", "jlora randomized_svd"
            ),
        ),
        Bar(
            4,
            "allocate_ranks on 224 layers, ms",
            50,
            lambda found: _median(
                found,
                ("updates", "allocate ranks", "224 layers", "jlora allocate_ranks"),
            ),
        ),
    ]


def _reconstruction_bars():
    def merge(dtype, rank, peer, operation="reconstruct donated"):
        case = Case("llama-2-7b", "attention", rank, "factors", dtype).name
        return lambda found: _ratio(
            found, ("reconstruction", operation, case), "jlora reconstruct", peer
        )

    bars = []
    for dtype in ("float32", "bfloat16"):
        for rank in (8, 16, 32, 64, 128):
            bars.append(
                Bar(
                    5,
                    f"donated merge over plain JAX, {dtype}, rank {rank}",
                    1 / 2.5 if rank <= 16 else 1 / 1.3,
                    merge(dtype, rank, "jax plain"),
                )
            )
            bars.append(
                Bar(
                    5,
                    f"merge over plain JAX, {dtype}, rank {rank}",
                    1.05,
                    merge(dtype, rank, "jax plain", "reconstruct"),
                )
            )
    layer = (
        "reconstruction",
        "apply factors backward",
        Case("llama-3.2-1b", "attention", 16, "factors", tokens=512).name,
    )
    columns = (
        "reconstruction",
        "reconstruct columns",
        Case("llama-2-7b", "attention", 16, "factors").name,
    )
    many = [
        (
            "reconstruction",
            "apply many",
            Case("llama-3.2-1b", "attention", 16, "factors", tokens=tokens).name,
        )
        for tokens in (512, 64)
    ]
    rounding = (
        "reconstruction",
        "rounding",
        "bfloat16 base of rms 0.02, delta of rms 1e-4",
    )
    return [
        *bars,
        Bar(
            5,
            "donated merge over torch addmm_, rank 16",
            2.0,
            merge("float32", 16, "torch addmm_"),
        ),
        Bar(
            5,
            "donated merge over torch addmm_, rank 64",
            1.2,
            merge("float32", 64, "torch addmm_"),
        ),
        Bar(
            5,
            "64 of 4096 columns over a full reconstruct",
            0.1,
            lambda found: _ratio(
                found, columns, "jlora 64 columns", "jlora all columns"
            ),
        ),
        Bar(
            5,
            "apply_factors and gradients over x @ base and its input gradient",
            1.1,
            lambda found: _ratio(
                found,
                layer,
                "jlora apply_factors",
                "jax base forward and input gradient",
            ),
        ),
        Bar(
            5,
            "apply_factors and gradients over the full weight-gradient step",
            0.75,
            lambda found: _ratio(
                found, layer, "jlora apply_factors", "jax full weight-gradient step"
            ),
        ),
        Bar(
            5,
            "apply_many over x @ base, 512 tokens",
            1.5,
            lambda found: _ratio(found, many[0], "jlora apply_many", "jax base alone"),
        ),
        Bar(
            5,
            "apply_many over x @ base, 64 tokens",
            1.7,
            lambda found: _ratio(found, many[1], "jlora apply_many", "jax base alone"),
        ),
        Bar(
            5,
            "stochastic rounding, bias in standard errors",
            4,
            lambda found: _error(
                found, (*rounding, "stochastic"), "bias in standard errors"
            ),
        ),
        Bar(
            5,
            "compensated rounding, relative error of the delta",
            1e-2,
            lambda found: _first_error(found, (*rounding, "compensated")),
        ),
        Bar(
            5,
            "temporary bytes of a donated bfloat16 merge, compiled for an H200",
            0,
            lambda found: _error(
                found,
                (
                    "reconstruction",
                    "compile ahead of time",
                    "H200",
                    "jlora reconstruct",
                ),
                "temporary bytes",
            ),
        ),
        Bar(
            5,
            "temporary bytes of a donated bfloat16 merge, compiled for a TPU v5e",
            0,
            lambda found: _error(
                found,
                (
                    "reconstruction",
                    "compile ahead of time",
                    "TPU v5e",
                    "jlora reconstruct",
                ),
                "temporary bytes",
            ),
        ),
    ]


def _adaptation_bars():
    bars = []
    for rank in (16, 64):
        key = (
            "adaptation",
            "pissa initialisation",
            f"Llama-shaped, hidden 2048, 8 layers, 56 matrices, rank {rank}, float32",
        )
        bars += [
            Bar(
                6,
                f"whole model, rank {rank}, warm, over peft niter 16",
                0.4,
                lambda found, key=key: _ratio(
                    found, key, "jlora adapt", "peft pissa_niter_16"
                ),
            ),
            Bar(
                6,
                f"whole model, rank {rank}, cold, over peft niter 16",
                1.2,
                lambda found, key=key: _ratio(
                    found, key, "jlora adapt, cold", "peft pissa_niter_16"
                ),
            ),
            Bar(
                6,
                f"whole model, rank {rank}, over peft exact",
                1 / 15,
                lambda found, key=key: _ratio(found, key, "jlora adapt", "peft pissa"),
            ),
            Bar(
                6,
                f"whole model, rank {rank}, excess error, worst layer",
                1e-4,
                lambda found, key=key: _first_error(found, (*key, "jlora adapt")),
            ),
            Bar(
                6,
                f"whole model, rank {rank}, resident memory above the weights, GiB",
                1.5,
                lambda found, key=key: _error(
                    found, (*key, "jlora adapt"), "extra GiB"
                ),
            ),
            *(
                Bar(
                    6,
                    f"whole model, rank {rank}, {kind}",
                    0,
                    lambda found, key=key, kind=kind: _error(
                        found, (*key, "jlora adapt"), kind
                    ),
                )
                for kind in (
                    "weights changed by repeating",
                    "weights changed by another layer",
                )
            ),
        ]
    step = (
        "adaptation",
        "lifted training step",
        "Llama-shaped, hidden 2048, 2 layers, 256 tokens",
    )
    for peer, bound in (
        ("hand-written apply_factors", 1.05),
        ("qwix", 1.0),
        ("flax nnx", 1.0),
    ):
        bars.append(
            Bar(
                6,
                f"training step through lift over {peer}",
                bound,
                lambda found, peer=peer: _ratio(found, step, "jlora lift", peer),
            )
        )
    return bars


def _median(found, key, factor=1.0):
    record = found.get(key)
    return None if record is None else factor * find_time(record).median


def _error(found, key, kind):
    record = found.get(key)
    return None if record is None else record["errors"].get(kind)


def _first_error(found, key):
    record = found.get(key)
    return None if record is None else find_error(record)[1]


def _ratio(found, group, ours, peer):
    records = found.get((*group, ours)), found.get((*group, peer))
    return None if None in records else ratio_of_medians(*records).ratio


def _worst(names, measure, pick=max):
    """Return the `Worst` of a measure over cases."""
    values = [value for value in map(measure, names) if value is not None]
    return Worst(pick(values, default=None), len(names) - len(values), len(names))


def _least(names, measure):
    return _worst(names, measure, min)


def _measure_temporaries(found, key):
    """Return the temporaries of a decomposition as a multiple of (m + n) * basis width."""
    record = found.get(key)
    if record is None:
        return None
    case = record["case"]
    num_passes, block, _ = plan_iteration((case["m"], case["n"]), case["rank"])
    numbers = record["temporary_bytes"] / 4
    return numbers / ((case["m"] + case["n"]) * block * (num_passes // 2))


def _svd_key(name, implementation):
    return ("factorization", "truncated svd", name, implementation)


def _measure_excess(found, name, kinds):
    values = [_error(found, _svd_key(name, _OURS), kind) for kind in kinds]
    return None if None in values else min(values)


def _excess_ratio(found, name):
    peer = _first_error(found, _svd_key(name, "torch.svd_lowrank niter 16"))
    ours = _first_error(found, _svd_key(name, _OURS))
    return None if None in (peer, ours) else peer / max(ours, 1e-12)


def _compile_ms(found, name):
    record = found.get(_svd_key(name, _OURS))
    if record is None or record["compile_ms"] is None:
        return None
    return record["lower_ms"] + record["compile_ms"]


def _ratio_at_energy(found, name, peer):
    """Return our time over the peer's, at our fewest passes that capture the peer's energy."""
    record = found.get(_svd_key(name, peer))
    if record is None:
        return None
    # Energies are told apart to the rounding of float32 results.
    wanted = record["errors"]["energy"] - 1e-7
    ratios = [
        _ratio(found, ("factorization", "truncated svd", name), key[3], peer)
        for key, ours in found.items()
        if key[:3] == _svd_key(name, "")[:3]
        and key[3].startswith(_OURS)
        and ours["errors"]["energy"] >= wanted
    ]
    return min(ratios, default=None)
