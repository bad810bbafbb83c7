"""The memory of whole jobs, each run in a process of its own."""

import functools
import shutil
import sys

import numpy as np

from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.run.environment import ROOT
from benchmarks.run.process_memory import measure_process, why_no_samples
from benchmarks.suites.checkpoints.synthetic import (
    BFLOAT16,
    SUITE,
    RandomBlock,
    Workspace,
    count_bytes,
    count_layers,
    list_modules,
    list_tensors,
    make_case,
)
from benchmarks.suites.checkpoints.written_files import write_adapter, write_checkpoint

MAX_MEMORY = 2**30
_CODE = """\
import sys
import jax
from jlora import checkpoints
base, tuned, thin, other, thick, output = sys.argv[1:7]
options = {"max_memory": int(sys.argv[7]), "progress": False}
key = jax.random.key(0)
"""
_JOBS = {
    "jlora initialize_checkpoint": (
        "pissa, rank 16",
        "initialize_checkpoint(base, output, rank=16, key=key, **options)",
    ),
    "jlora extract_checkpoint": (
        "rank 32",
        "extract_checkpoint(base, tuned, output, rank=32, key=key, **options)",
    ),
    "jlora merge_checkpoint": (
        "an adapter of rank 16",
        "merge_checkpoint(base, thin, output, **options)",
    ),
    "jlora resize_adapter": (
        "rank 64 to 16",
        "resize_adapter(thick, output, rank=16, **options)",
    ),
    "jlora combine_adapters": (
        "two of rank 16 to one",
        "combine_adapters({thin: 1.0, other: 0.5}, output, rank=16, **options)",
    ),
}
_ADAPTERS = {"thin": 16, "other": 16, "thick": 64}


def make_memory_group(num_bytes, hidden, vocabulary, max_memory=MAX_MEMORY):
    """Return the group of the peak memory of each job on one checkpoint."""
    layers = count_layers(num_bytes, hidden, vocabulary)
    sizes = hidden, layers, vocabulary
    total = count_bytes(list_tensors(*sizes)) / 2**30
    contenders = [
        Contender(
            name,
            functools.partial(_prepare, call, max_memory),
            "jlora",
            f"{setting}, in a fresh process",
            most_runs=1,
            skip=why_no_samples(),
        )
        for name, (setting, call) in _JOBS.items()
    ]

    name = f"{total:.2f} GiB, hidden {hidden}, {layers} layers, max_memory "
    name += f"{max_memory / 2**30:g} GiB"
    return Group(
        SUITE,
        "peak memory",
        make_case(hidden, layers, 16, "bfloat16", name),
        functools.partial(_make_inputs, sizes),
        tuple(contenders),
        lambda inputs, peak: {"peak anonymous GiB": peak / 2**30},
    )


def _make_inputs(sizes):
    """Return the workspace of two checkpoints and three adapters."""
    workspace, block = Workspace(), RandomBlock()
    shapes, modules = list_tensors(*sizes), list_modules(*sizes[:2])

    def make_tuned(name, shape):
        weight = block.make_weight(name, shape)
        if name.removesuffix(".weight") not in modules:
            return weight
        change = np.float32(0.01) * block.make_numbers(f"{name} change", shape)
        return (weight.astype(np.float32) + change).astype(BFLOAT16)

    write_checkpoint(workspace.path / "base", shapes, block.make_weight)
    write_checkpoint(workspace.path / "tuned", shapes, make_tuned)
    for name, rank in _ADAPTERS.items():
        write_adapter(workspace.path / name, modules, rank, block.make_numbers)
    return (workspace,)


def _prepare(call, max_memory, workspace):
    code = f"{_CODE}checkpoints.{call}"
    names = ("base", "tuned", *_ADAPTERS)
    paths = [str(workspace.path / name) for name in names]

    def run():
        output = workspace.clear("output")
        arguments = [sys.executable, "-c", code, *paths, str(output), str(max_memory)]
        return measure_process(arguments, folder=ROOT)

    def fetch(peak):
        # The outputs of two jobs are as large as the checkpoint.
        shutil.rmtree(workspace.path / "output", ignore_errors=True)
        return peak

    return Prepared(run, fetch)
