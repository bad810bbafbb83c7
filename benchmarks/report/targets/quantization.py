"""Targets of quantised bases: size, time and memory (part 11)."""

from benchmarks.report.targets.measures import measure_error, measure_ratio
from benchmarks.report.targets.target import Target
from benchmarks.suites.quantization import list_groups
from benchmarks.suites.quantization.formats import BITS
from benchmarks.suites.quantization.layers import FLOAT, QWIX, name_format
from benchmarks.suites.quantization.models import PLAIN, QUANTIZED
from benchmarks.suites.quantization.pretrained import (
    OPERATION,
    OUTPUTS,
    WEIGHTS,
    name_setting,
)

_PROBLEMS = {
    group.operation: (group.suite, group.operation, group.case.name)
    for group in list_groups("full", "cpu")
}
_FORMATS = _PROBLEMS["quantize"]
_LAYER = _PROBLEMS["layer, forward and backward"]
_MODEL = _PROBLEMS["pissa of a model"]
_NF4 = name_format("nf4")
_PRETRAINED = ("quantization", OPERATION, "all-MiniLM-L6-v2, rank 16")
_FLOAT_BYTES = 4


def _measure_memory(found):
    """Return the temporary bytes of the layer, over the base in float32."""
    record = found.get((*_LAYER, _NF4))
    if record is None or record["temporary_bytes"] is None:
        return None
    size = record["case"]["m"] * record["case"]["n"]
    return record["temporary_bytes"] / (_FLOAT_BYTES * size)


def _measure_quotient(kind, ours, other):
    """Return the measure of one error on MiniLM over another, both in NF4."""

    def measure(found):
        keys = [(*_PRETRAINED, name_setting(name, "nf4")) for name in (ours, other)]
        if any(key not in found for key in keys):
            return None
        our_error, other_error = (found[key]["errors"][kind] for key in keys)
        return our_error / other_error

    return measure


TARGETS = (
    *(
        Target(
            11,
            f"{name}, bits for each number",
            bound,
            measure_error((*_FORMATS, f"jlora {name}"), BITS),
        )
        for name, bound in (("nf4", 4.13), ("int4", 4.26), ("int8", 8.1))
    ),
    Target(
        11,
        "layer on NF4, temporary memory over the base in float32",
        0.25,
        _measure_memory,
    ),
    Target(
        11,
        "layer on NF4, time over a float32 base",
        1.6,
        measure_ratio(_LAYER, _NF4, FLOAT),
    ),
    Target(11, "layer on NF4, time over qwix", 1.0, measure_ratio(_LAYER, _NF4, QWIX)),
    Target(
        11,
        "PiSSA of a model with an NF4 residual, time over without",
        1.5,
        measure_ratio(_MODEL, QUANTIZED, PLAIN),
    ),
    *(
        Target(
            11,
            f"MiniLM on NF4, error of the outputs, {ours} over LoftQ with 5 rounds",
            0.7,
            _measure_quotient(OUTPUTS, ours, "loftq, 5 rounds"),
        )
        for ours in ("qera, 5 rounds", "qera, 16 rounds")
    ),
    *(
        Target(
            11,
            f"MiniLM on NF4, error of the weights, {ours} over {other}",
            1.0,
            _measure_quotient(WEIGHTS, ours, other),
        )
        for ours, other in (
            ("loftq, 5 rounds", "lora"),
            ("qpissa, 5 rounds", "loftq, 5 rounds"),
        )
    ),
)
