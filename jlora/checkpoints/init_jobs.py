"""`initialize_checkpoint`: a model folder → an adapter, and a base if it moves."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jlora import _checks
from jlora._types import PRNGKey
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    check_wish,
    plan_report,
)
from jlora.checkpoints.architectures import Layouts, check_layouts
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.float_weights import check_changeable
from jlora.checkpoints.folders import read_model_config
from jlora.checkpoints.init_run import InitRun
from jlora.checkpoints.initial_factors import (
    check_memory,
    check_method,
    check_stacks,
)
from jlora.checkpoints.memory import check_max_memory
from jlora.checkpoints.modules import (
    StoredModule,
    is_target,
    list_modules,
)
from jlora.checkpoints.output_folder import (
    check_target,
    identify,
)
from jlora.checkpoints.quantized_bases import check_quantizable
from jlora.checkpoints.shared_jobs import choose_part, choose_report, run_shared
from jlora.checkpoints.shared_output import JobFolder
from jlora.initializers.base import Initializer
from jlora.quantization.base import Format
from jlora.quantization.formats import as_format

Path = str | os.PathLike[str]


def initialize_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    method: str | Initializer | Callable = "pissa",
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int = 256,
    targets: str | None = None,
    layouts: Layouts | None = None,
    quantize: Format | str | None = None,
    portable: bool = True,
    key: PRNGKey,
    max_memory: int | None = None,
    process: tuple[int, int] | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
) -> AdapterReport:
    """Write the first factors of a model as an adapter, and its base if that moves.

    `output/adapter/` is a folder of PEFT. If the method moves the base (PiSSA, MiLoRA,
    OLoRA, ...), `output/base/` is a checkpoint like the input, whose weights and deltas
    add up to the input: train the adapter on it. A few matrices are in memory at a
    time. A run that was interrupted goes on where it was.

    Args:
        checkpoint: .safetensors files, see `open_checkpoint`.
        output: folder to write; it must not exist.
        method: the initializer, as in `Rule`; one that needs no data.
        rank: of every module, or its largest if that is less. None: not by rank.
        energy: part of the squared norm of each weight that its rank has to keep. None:
            not by energy.
        budget: numbers in all the factors; ranks go where they keep most of the
            weights. None: not by budget.
        max_rank: static, largest rank that `energy` and `budget` may give.
        targets: regular expression, searched in the names of modules and tensors. None:
            all matrices but embeddings, heads and routers.
        layouts: {regular expression on a module or tensor: "io" or "oi"} for models
            that jlora does not know; the first one that matches decides. None: the
            table of jlora, and "oi", PyTorch's [outputs, inputs], for all others.
        quantize: static, format of `jlora.quantization` in which the bases of the
            adapted weights are stored, or its name; read it with `load_weights`. If all
            of them are stored as [outputs, inputs] and have whole blocks, NF4 and int8
            (one scale for each output) are written as transformers and bitsandbytes
            read them. None: in the dtype of the model.
        portable: as in `save_peft`.
        key: one typed PRNG key, consumed; folded with each name.
        max_memory: bytes of the process, with about 200 MiB for JAX itself. None: no
            limit.
        process: (index, count), the part of the work for this process; all of them
            must see one file system. Each writes its matrices and ends, and the last
            one completes the folder, with the same bytes as one process. Rerun the
            one that died. None: everything, or the part of this process of
            `jax.distributed`, where all return when the folder is there.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        dry_run: only check, and return the largest ranks that there may be, with NaN
            for unknown numbers.

    Returns:
        `AdapterReport`, without modules if other processes have work left; the energy
        is the part of the weight that the delta holds. Matrices that are targets and
        have no factors are listed in `skipped`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank, energy and budget, a method that needs data
            or has no base, damaged files, a weight in fp8, NaN or Inf, no matrix that
            `targets` matches, one that does not fit in `max_memory`, an output that
            exists or has no room.

    Cost: as `adapt`, and a copy of the files; with `energy` and `budget` one
        `randomized_svd` of each weight more.

    Accuracy: base and delta add up to the weight with one rounding to its dtype.

    Example:
        >>> import jax, numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = f"{folder.name}/model.safetensors"
        >>> jlora.save_arrays(path, {"layers.0.q_proj.weight": np.eye(4, dtype="f4")})
        >>> report = jlora.checkpoints.initialize_checkpoint(
        ...     path, f"{folder.name}/new", rank=2, key=jax.random.key(0),
        ...     progress=False)
        >>> factors, _ = jlora.load_peft(f"{folder.name}/new/adapter")
        >>> factors["layers.0.q_proj"].u.shape
        (4, 2)
        >>> folder.cleanup()
    """
    wish = check_wish(rank, energy, budget)
    _checks.check_key(key)
    max_rank = wish.rank or _checks.check_integer(max_rank, "max_rank")
    max_memory = check_max_memory(max_memory)
    initializer = check_method(method)
    format = None if quantize is None else as_format(quantize, "quantize")
    part = choose_part(process)

    # Find out everything before the first byte is written.
    source = open_checkpoint(checkpoint)
    inputs = [source.path]
    check_target(pathlib.Path(output).absolute(), inputs)
    modules, skipped = _list_targets(source, check_layouts(layouts), targets)
    check_stacks(initializer, modules)
    check_quantizable(modules, format)
    check_memory(modules, max_rank, max_memory)
    if dry_run:
        sizes = {
            module.path: (min(module.shape), initializer.max_rank(*module.shape))
            for module in modules
        }
        return plan_report(sizes, max_rank, skipped)

    job = {
        "job": "init",
        "inputs": [identify(path) for path in source.files],
        "method": initializer.label,
        "quantize": format and format.label,
        "wish": [*wish, max_rank],
        "patterns": [targets, layouts],
        "portable": portable,
        "key": jax.random.key_data(key).tolist(),
    }
    run = InitRun(
        source, modules, initializer, format, wish, max_rank, key, max_memory, progress
    )
    place = JobFolder(output, inputs, run.count_bytes(), job)
    report = run_shared(
        place,
        part,
        run.list_first_files(),
        run.write_part,
        functools.partial(run.write_all, portable=portable),
    )
    return choose_report(report, part)._replace(skipped=tuple(skipped))


def _list_targets(
    source: Checkpoint, layouts: Mapping[str, str], targets: str | None
) -> tuple[list[StoredModule], list[tuple[str, str]]]:
    """Return the modules to adapt, and (tensor, reason) of targets that have none."""
    config: Mapping[str, Any] = read_model_config(source.path)
    modules, reasons = list_modules(source, config, layouts)
    chosen = [module for module in modules if is_target(module, targets)]
    if not chosen:
        raise ValueError(
            f"{source.path}: must hold a matrix that `targets` matches, got none. "
            "List the names with `jlora show`."
        )
    for name in source:
        source.locate(name)  # refuses formats whose bytes cannot be copied
    for module in chosen:
        for piece in module.pieces:
            info = source.info(piece.tensor)
            check_changeable(info.file, piece.tensor, info.dtype)
    skipped = [
        (name, reason)
        for name, reason in reasons.items()
        if "expert" in reason or (targets is not None and re.search(targets, name))
    ]
    return chosen, skipped
