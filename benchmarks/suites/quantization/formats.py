"""A weight in each format: time, error and bits for each number."""

import functools

import numpy as np

from benchmarks.run.contenders import Contender, Group
from benchmarks.run.preparation import prepare_jax
from benchmarks.suites.reconstruction.layers import make_layer
from jlora.quantization import fp8, int4, int8, nf4, quantize

SUITE = "quantization"
FORMATS = {
    "nf4": nf4(),
    "nf4, float32 scales": nf4(double_quant=False),
    "int8": int8(),
    "int4": int4(),
    "fp8": fp8(),
}
BITS = "bits for each number"


def make_format_group(case):
    """Return the group of a quantisation in each format."""
    contenders = [
        Contender(
            f"jlora {name}",
            functools.partial(_prepare, format=format),
            "jlora",
            format.label,
        )
        for name, format in FORMATS.items()
    ]
    return Group(
        SUITE,
        "quantize",
        case,
        lambda: (make_layer(case).w,),
        tuple(contenders),
        _measure,
    )


def _prepare(w, format):
    prepared = prepare_jax(lambda w: quantize(w, format), w)
    return prepared._replace(fetch=lambda array: array)


def _measure(inputs, array):
    (w,) = inputs
    found = np.asarray(array.dequantize(), np.float64)
    return {
        "relative error": float(np.linalg.norm(found - w) / np.linalg.norm(w)),
        BITS: 8 * array.nbytes / array.size,
    }
