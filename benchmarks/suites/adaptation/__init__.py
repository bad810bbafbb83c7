"""Adapting whole models: their first factors, a step of training, one adapted layer.

llama_weights        the weights of a Llama-shaped model
whole_models         the PiSSA initialisation of all weights
jlora_models         the same by jlora.adapt: its time, its memory, its independence
peft_models          the same by PEFT
memory               the resident memory that a function needs
llama_network        a Llama-shaped model, its products left open
lifted_steps         a step of training its factors
nnx_networks         the same model as modules of Flax and qwix
encoder_embeddings   the embeddings of MiniLM
encoder_steps        a step of training MiniLM
adapted_layers       one adapted layer, forward and backward
"""

from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.run.cases import WholeCase
from benchmarks.run.compiled import make_compile_group
from benchmarks.suites.adaptation.adapted_layers import make_layer_group
from benchmarks.suites.adaptation.encoder_embeddings import make_embedding_group
from benchmarks.suites.adaptation.encoder_steps import make_step_group
from benchmarks.suites.adaptation.lifted_steps import make_lifted_group
from benchmarks.suites.adaptation.whole_models import make_cold_group, make_model_group

_COMPILED_PROGRAMS = (  # program, contender, setting
    (
        "adapt bfloat16, two weights",
        "jlora adapt",
        "a chunk of two, 4096×4096, donated, rank 16",
    ),
    (
        "lift bfloat16, scan over four layers",
        "jlora lift",
        "gradients of u and v through a scan over 4 × 4096×4096, 256 tokens, rank 16",
    ),
)
_COMPILED_KINDS = ("temporary_bytes", "alias_bytes", "num_kernels", "compile_ms")


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    is_full = level_name == "full"
    groups = []
    for sizes in _list_model_sizes(is_full, platform):
        groups.append(make_model_group(*sizes, is_full=is_full))
        groups.append(make_cold_group(*sizes))

    groups.append(make_embedding_group())
    if not is_full:
        groups.append(make_step_group(rank=16, pairs=8, time=32))
        groups.append(make_lifted_group(hidden=512, layers=2, tokens=64, rank=16))
        groups.append(make_layer_group(size=512, tokens=128, rank=16))
        return groups

    groups.append(make_step_group(rank=16, pairs=32, time=128))
    groups.append(make_lifted_group(hidden=2048, layers=2, tokens=256, rank=16))
    groups.append(make_layer_group(size=2048, tokens=512, rank=16))
    return groups + _list_compile_groups()


def _list_model_sizes(is_full, platform):
    """Return [(hidden, layers, rank, dtype)] of the whole models."""
    if not is_full:
        return [(1024, 2, 16, "float32")]
    if platform == "gpu":
        return [(4096, 32, 16, "bfloat16"), (4096, 32, 128, "bfloat16")]
    return [
        (1024, 8, 16, "float32"),
        (2048, 8, 16, "float32"),
        (2048, 8, 64, "float32"),
    ]


def _list_compile_groups():
    """Return the groups that compile for accelerators; no such device is needed."""
    return [
        _make_compile_group(target, *program)
        for target in TARGETS
        for program in _COMPILED_PROGRAMS
    ]


def _make_compile_group(target, program, name, setting):
    case = WholeCase(f"{program}, {target}")
    return make_compile_group(
        "adaptation", case, target, program, name, setting, _COMPILED_KINDS
    )
