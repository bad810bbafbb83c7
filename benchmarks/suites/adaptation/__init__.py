"""Adapting whole models: their first factors, a step of training, one adapted layer."""

from benchmarks.run.ahead_of_time import TARGETS
from benchmarks.run.cases import WholeCase
from benchmarks.run.compiled import make_compile_group
from benchmarks.suites.adaptation.adapted_layers import make_layer_group
from benchmarks.suites.adaptation.encoder_steps import (
    make_embedding_group,
    make_step_group,
)
from benchmarks.suites.adaptation.lifted_steps import make_lifted_group
from benchmarks.suites.adaptation.whole_models import make_cold_group, make_model_group


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    full = level_name == "full"
    groups = []
    for sizes in _list_model_sizes(full, platform):
        groups += [make_model_group(*sizes, is_full=full), make_cold_group(*sizes)]
    groups.append(make_embedding_group())
    groups.append(make_step_group(16, 32, 128) if full else make_step_group(16, 8, 32))
    groups.append(_make_lifted_group(full))
    groups.append(
        make_layer_group(2048, 512, 16) if full else make_layer_group(512, 128, 16)
    )
    if full:
        groups += _list_compile_groups()
    return groups


def _list_compile_groups():
    """Return the groups that compile for accelerators that need not be here."""
    kinds = ("temporary_bytes", "alias_bytes", "num_kernels", "compile_ms")
    programs = {
        "adapt bfloat16, two weights": (
            "jlora adapt",
            "a chunk of two, 4096×4096, donated",
        ),
        "lift bfloat16, scan over four layers": (
            "jlora lift",
            "gradients of u and v through a scan over 4 × 4096×4096, 256 tokens",
        ),
    }
    return [
        make_compile_group(
            "adaptation",
            WholeCase(f"{program}, {target}"),
            target,
            program,
            name,
            f"{setting}, rank 16",
            kinds,
        )
        for target in TARGETS
        for program, (name, setting) in programs.items()
    ]


def _make_lifted_group(full):
    return (
        make_lifted_group(2048, 2, 256, 16)
        if full
        else make_lifted_group(512, 2, 64, 16)
    )


def _list_model_sizes(full, platform):
    """Return [(hidden, layers, rank, dtype)] of the whole models."""
    if not full:
        return [(1024, 2, 16, "float32")]
    if platform == "gpu":
        return [(4096, 32, rank, "bfloat16") for rank in (16, 128)]
    return [
        (1024, 8, 16, "float32"),
        *((2048, 8, rank, "float32") for rank in (16, 64)),
    ]
