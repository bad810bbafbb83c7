"""An adapter merged into a sharded checkpoint, beside a copy of its files."""

import functools
import os

import numpy as np

import jlora
from benchmarks.run.contenders import Contender, Group, Prepared
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
from jlora.checkpoints import merge_checkpoint, open_checkpoint

# Sums in float32 may fall on the other side of a tie of bfloat16.
_TIE = 2.0**-22
_LEAST_RUNS = 3  # the first run compiles, and the ratio needs common rounds


def make_merge_group(num_bytes, hidden, vocabulary, rank):
    """Return the group that merges an adapter of all layers into a checkpoint."""
    layers = count_layers(num_bytes, hidden, vocabulary)
    sizes = hidden, layers, vocabulary
    total = count_bytes(list_tensors(*sizes))
    contenders = (
        Contender(
            "jlora merge_checkpoint",
            _prepare_merge,
            "jlora",
            "defaults",
            least_runs=_LEAST_RUNS,
        ),
        Contender(
            "copy of the files",
            _prepare_copy,
            setting="os.sendfile and os.fsync of each file, os.fsync of the folder",
            least_runs=_LEAST_RUNS,
        ),
    )

    name = f"{total / 2**30:.2f} GiB, hidden {hidden}, {layers} layers, rank {rank}"
    return Group(
        SUITE,
        "merge adapter",
        make_case(hidden, layers, rank, "bfloat16", name),
        functools.partial(_make_inputs, sizes, rank),
        contenders,
        _measure_errors,
        bytes=2.0 * total,
    )


def _make_inputs(sizes, rank):
    """Return (workspace, the modules whose weights are checked)."""
    workspace, block = Workspace(), RandomBlock()
    hidden, layers, _ = sizes
    base = workspace.path / "base"
    write_checkpoint(base, list_tensors(*sizes), block.make_weight)

    modules = list_modules(hidden, layers)
    # Entries of 0.02 in both factors: the deltas are some percent of the weights.
    write_adapter(workspace.path / "adapter", modules, rank, block.make_numbers)
    return workspace, (next(iter(modules)), list(modules)[-1])


def _prepare_merge(workspace, checked):
    base, adapter = (workspace.path / name for name in ("base", "adapter"))

    def run():
        output = workspace.clear("merged")
        merge_checkpoint(base, adapter, output, progress=False)
        return output

    return Prepared(run, lambda output: output)


def _prepare_copy(workspace, checked):
    def run():
        _copy_folder(workspace.path / "base", workspace.clear("copied"))

    return Prepared(run, lambda output: output)


def _copy_folder(source, target):
    """Copy the files of a folder, and return when they are on the disk."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        # No copy_file_range: some file systems would only share the blocks.
        with open(path, "rb") as old, open(target / path.name, "wb") as new:
            while os.sendfile(new.fileno(), old.fileno(), None, 2**30):
                pass
            os.fsync(new.fileno())

    folder = os.open(target, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _measure_errors(inputs, output):
    """Return the numbers of wrong elements, and of ties rounded the other way.

    A copy has neither.
    """
    if output is None:
        return {}
    workspace, checked = inputs
    base, merged = open_checkpoint(workspace.path / "base"), open_checkpoint(output)
    factors, _ = jlora.load_peft(workspace.path / "adapter")

    counts = np.zeros(2, int)
    for path in checked:
        name = f"{path}.weight"
        counts += _count_wrong(base[name], factors[path], merged[name])
    return {"wrong elements": counts[0], "ties rounded otherwise": counts[1]}


def _count_wrong(weight, factors, merged):
    u, v = (np.asarray(part, np.float64) for part in factors)
    weight, found = (np.asarray(each, np.float64) for each in (weight, merged))
    delta = (u @ v).T
    total = weight + delta
    expected = np.asarray(total.astype(BFLOAT16), np.float64)

    excess = np.abs(found - total) - np.abs(expected - total)
    # Terms of the delta may cancel: its rounding is relative to their sizes.
    size = np.abs(weight) + (np.abs(u) @ np.abs(v)).T
    is_wrong = excess > _TIE * size
    return np.sum(is_wrong), np.sum((found != expected) & ~is_wrong)
