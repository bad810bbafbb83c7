"""Targets of the package as a whole: import, demonstration, runs of all benchmarks."""

from benchmarks.report.targets.measures import (
    measure_error,
    measure_ratio,
    measure_time,
)
from benchmarks.report.targets.target import Target

_IMPORT = ("package", "import", "a fresh process")
_DEMO = ("package", "demo", "a fresh process", "jlora demo")
_RUNS = {
    level: ("package", "all suites", level, "benchmarks") for level in ("quick", "full")
}
_EMBEDDINGS = ("adaptation", "embed sentences", "MiniLM-L6", "jlora, plain weights")
_SECONDS = 1e-3  # in one ms


def _measure_demo_gain(found):
    before = measure_error(_DEMO, "no adaptation")(found)
    after = measure_error(_DEMO, "V only, from the SVD")(found)
    return None if before is None or after is None else before - after


TARGETS = (
    Target(
        1,
        "import jlora over import jax, optax",
        1.1,
        measure_ratio(_IMPORT, "import jlora", "import jax, optax"),
    ),
    Target(1, "jlora demo, seconds", 180, measure_time(_DEMO, _SECONDS)),
    Target(
        1,
        "jlora demo, loss of the reloaded weights, difference",
        1e-5,
        measure_error(_DEMO, "reloaded loss difference"),
    ),
    Target(
        1,
        "jlora demo, bits per byte gained by V only",
        0.1,
        _measure_demo_gain,
        at_least=True,
    ),
    Target(
        2,
        "run --quick of everything, seconds",
        360,
        measure_time(_RUNS["quick"], _SECONDS),
    ),
    Target(
        2,
        "run --full of everything, seconds",
        3600,
        measure_time(_RUNS["full"], _SECONDS),
    ),
    Target(
        2,
        "MiniLM embeddings, difference from transformers",
        1e-5,
        measure_error(_EMBEDDINGS, "difference"),
    ),
)
