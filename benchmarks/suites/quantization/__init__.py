"""Quantised bases: the formats themselves, a layer on such a base, a whole model.

formats     weight → codes and scales: time, error, bits
layers      forward and backward of a layer, beside the same base in float32
models      PiSSA of all matrices of a model, with and without a quantised residual
pretrained  errors of MiniLM's weights and outputs, for each format and initializer
"""

from benchmarks.run.cases import Case
from benchmarks.suites.quantization.formats import make_format_group
from benchmarks.suites.quantization.layers import make_layer_group
from benchmarks.suites.quantization.models import make_model_group
from benchmarks.suites.quantization.pretrained import make_pretrained_group


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    del platform
    if level_name == "quick":
        return [
            make_format_group(Case("bert-base", "attention", 16, "normal")),
            make_layer_group(Case("bert-base", "attention", 16, "normal", tokens=128)),
            make_model_group(hidden=256, layers=1),
        ]
    return [
        make_format_group(Case("llama-3.2-1b", "attention", 16, "normal")),
        make_layer_group(Case("llama-2-7b", "attention", 16, "normal", tokens=512)),
        make_model_group(hidden=2048, layers=8),
        make_pretrained_group(16),
        *(make_pretrained_group(rank, ("nf4",)) for rank in (8, 64)),
    ]
