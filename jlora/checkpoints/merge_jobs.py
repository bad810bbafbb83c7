"""`merge_checkpoint`: a model folder with adapters merged in, tensor by tensor."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.checkpoints.adapter_sums import list_weighted
from jlora.checkpoints.architectures import Layouts, check_layouts
from jlora.checkpoints.changes import find_changes
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.folders import find_side_files, read_model_config
from jlora.checkpoints.memory import check_fits, check_max_memory
from jlora.checkpoints.merge_blocks import WORK_BYTES, write_tensors
from jlora.checkpoints.merge_plan import (
    OutputTensor,
    list_inputs,
    make_side_file,
    plan_files,
)
from jlora.checkpoints.output_folder import OutputFolder, check_target, identify
from jlora.checkpoints.peft_file import PeftFile, open_peft
from jlora.checkpoints.peft_reader import read_adapter
from jlora.checkpoints.shared_jobs import choose_part, run_shared
from jlora.checkpoints.shared_output import JobFolder
from jlora.checkpoints.tied import Untied, untie
from jlora.reconstruction.rounding import check_rounding

Path = str | os.PathLike[str]


class MergeReport(NamedTuple):
    """The tensors that `merge_checkpoint` changed, or would change.

    Example:
        >>> import jlora
        >>> jlora.checkpoints.MergeReport._fields
        ('changed', 'copied', 'num_bytes', 'untied')
    """

    changed: tuple[str, ...]  # names of tensors
    copied: int  # tensors copied byte for byte
    num_bytes: int  # of the new files of tensors
    untied: str | None  # the head that was written apart from its embedding


def merge_checkpoint(
    base: Path,
    adapters: Path | Sequence[Path] | Mapping[Any, float],
    output: Path,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: PRNGKey | None = None,
    layouts: Layouts | None = None,
    max_memory: int | None = None,
    process: tuple[int, int] | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> MergeReport:
    """Write a checkpoint with PEFT adapters merged in, and return what changed.

    The output is sharded like the input. A tensor that no adapter changes is copied
    byte for byte, and so are the side files (tokeniser, configuration). Only blocks of
    a matrix and the adapters are in memory. The folder appears when it is whole; a run
    that was interrupted goes on where it was, with the same bytes.

    An adapter of an embedding that the model also uses as its head does not change the
    head, neither before merging nor after: the head is written apart, and
    `tie_word_embeddings` becomes false.

    Args:
        base: .safetensors files, see `open_checkpoint`.
        adapters: folder of an adapter, several of them, or {folder: weight}. Their
            deltas are added, without cross terms.
        output: folder to write; it must not exist.
        rounding: static, how sums become bfloat16 or float16, see `reconstruct`.
        key: one typed PRNG key for "stochastic", consumed. None for "nearest".
        layouts: {regular expression on a module or tensor: "io" or "oi"} for square
            matrices of models that jlora does not know. None: the table of jlora.
        max_memory: bytes of the process, with about 200 MiB for JAX itself. None: no
            limit.
        process: (index, count), the part of the work for this process; all of them
            must see one file system. Each writes its files and ends, and the last
            one completes the folder, with the same bytes as one process. Rerun the
            one that died. None: everything, or the part of this process of
            `jax.distributed`, where all return when the folder is there.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        dry_run: only check, and return what would be done.

    Returns:
        `MergeReport`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: damaged inputs, an adapter of another model, a weight in fp8, parts
            that cannot be merged, an output that exists or has no room.

    Cost: one pass over the input; about 100 MiB beside the adapters.

    Accuracy: each sum is computed in float32 (float64 for float64) and rounded once.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> base, adapter, new = (f"{folder.name}/{name}" for name in "ban")
        >>> jlora.save_arrays(f"{base}.safetensors", {"layers.0.q.weight": np.eye(2)})
        >>> delta = jlora.Factors(np.ones((2, 1)), np.ones((1, 2)))
        >>> jlora.save_peft(adapter, {"layers.0.q": delta})
        >>> report = jlora.checkpoints.merge_checkpoint(
        ...     f"{base}.safetensors", adapter, new, progress=False)
        >>> report.changed
        ('layers.0.q.weight',)
        >>> jlora.checkpoints.open_checkpoint(new)["layers.0.q.weight"].tolist()
        [[2.0, 1.0], [1.0, 2.0]]
        >>> folder.cleanup()
    """
    check_rounding(rounding, key, jnp.dtype(jnp.bfloat16))
    if rounding == "compensated":
        raise ValueError(
            "`rounding` must be 'nearest' or 'stochastic', got 'compensated', which "
            "needs two tensors. Choose one of them."
        )

    part = choose_part(process)

    # Find out everything before the first byte is written.
    checkpoint = open_checkpoint(base)
    is_folder = checkpoint.path.is_dir()
    config = read_model_config(checkpoint.path)
    weighted = list_weighted(_name_weights(adapters))
    inputs = [checkpoint.path, *(path for path, _ in weighted)]
    check_target(pathlib.Path(output).absolute(), inputs)
    opened = [(open_peft(path), weight) for path, weight in weighted]
    _check_memory([file for file, _ in opened], check_max_memory(max_memory))
    loaded = [(read_adapter(file), weight) for file, weight in opened]
    changes = find_changes(checkpoint, config, loaded, check_layouts(layouts))
    untied = untie(changes, checkpoint, config)
    files = plan_files(checkpoint, changes, untied)

    report = _make_report(files, untied)
    if dry_run:
        return report

    sides = find_side_files(checkpoint.path) if is_folder else []
    job = {
        "job": "merge",
        "inputs": [identify(path) for path in list_inputs(checkpoint, weighted)],
        "weights": [weight for _, weight in weighted],
        "rounding": rounding,
        "key": None if key is None else jax.random.key_data(key).tolist(),
    }
    size = report.num_bytes + sum(path.stat().st_size for path in sides)
    names = {path: path.name if is_folder else "model.safetensors" for path in files}

    def write_files(folder: OutputFolder) -> None:
        total = len(report.changed) + report.copied
        with Progress("merge", total, enabled=progress, unit="tensors") as bar:
            write = functools.partial(
                write_tensors, checkpoint, rounding=rounding, key=key, bar=bar
            )
            for number, (path, plan) in enumerate(files.items()):
                is_ours = folder.owns(number, len(files))
                run = functools.partial(write, path, plan)
                if is_ours and not folder.write(names[path], run):
                    bar.count(len(plan))

    def write_all(folder: OutputFolder) -> MergeReport:
        write_files(folder)
        for path in sides:
            content = make_side_file(
                path, files, config, report.num_bytes, untied is not None
            )
            folder.write(path.name, content)
        return report

    place = JobFolder(output, inputs, size, job)
    run_shared(place, part, list(names.values()), write_files, write_all)
    return report


def _make_report(
    files: Mapping[pathlib.Path, Sequence[OutputTensor]], untied: Untied | None
) -> MergeReport:
    tensors = [tensor for plan in files.values() for tensor in plan]
    return MergeReport(
        tuple(tensor.name for tensor in tensors if tensor.change),
        sum(tensor.change is None for tensor in tensors),
        sum(tensor.num_bytes for tensor in tensors),
        untied.head if untied else None,
    )


def _check_memory(files: Sequence[PeftFile], max_memory: int | None) -> None:
    """Refuse adapters that do not fit together in the memory of the job."""
    # As stored, in float32 with the scale, and of one tensor in its layout.
    needed = 3 * sum(file.checkpoint.num_bytes for file in files) + WORK_BYTES
    check_fits(max_memory, needed, ", ".join(str(file.folder) for file in files))


def _name_weights(
    adapters: Path | Sequence[Path] | Mapping[Any, float],
) -> Mapping[Any, float]:
    if isinstance(adapters, Mapping):
        return adapters
    is_one = isinstance(adapters, (str, os.PathLike))
    return dict.fromkeys([adapters] if is_one else adapters, 1.0)
