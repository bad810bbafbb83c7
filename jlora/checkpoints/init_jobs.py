"""`initialize_checkpoint`: a model folder → an adapter, and a base if it moves."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from jlora import _checks
from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.adaptation.batching import adapt
from jlora.adaptation.plan import make_plan
from jlora.adaptation.rank_rules import RankRule
from jlora.adaptation.rule import Rule
from jlora.checkpoints.adapter_ranks import AdapterReport, RankWish, check_wish
from jlora.checkpoints.architectures import (
    EMBEDDINGS,
    find_module,
    is_inputs_first,
    is_one_expert,
)
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.float_weights import (
    check_changeable,
    is_floating,
    is_fp8,
)
from jlora.checkpoints.folders import find_side_files, read_model_config
from jlora.checkpoints.init_report import report_adapted
from jlora.checkpoints.json_files import write_json
from jlora.checkpoints.output_folder import (
    OutputFolder,
    copy_file,
    copy_range,
    identify,
    open_output,
    write_array,
)
from jlora.checkpoints.peft import format_adapter
from jlora.checkpoints.peft_config import CONFIG_NAME, MODEL_NAME
from jlora.checkpoints.peft_reader import make_pair
from jlora.checkpoints.safetensors import format_header, write_safetensors
from jlora.factors import Factors
from jlora.initializers.base import Initializer
from jlora.initializers.lookup import as_initializer

Path = str | os.PathLike[str]

# Matrices that are seldom adapted: embeddings, heads, routers.
_NOT_TARGETS = r"(lm_head|embed_out|classifier|score|router|(^|\.)gate)\.weight$"


def initialize_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    method: str | Initializer | Callable = "pissa",
    rank: int | None = None,
    energy: float | None = None,
    targets: str | None = None,
    portable: bool = True,
    key: PRNGKey,
    progress: bool | None = None,
) -> AdapterReport:
    """Write the first factors of a model as an adapter, and its base if that moves.

    `output/adapter/` is a folder of PEFT. If the method moves the base (PiSSA, MiLoRA,
    OLoRA, ...), `output/base/` is a checkpoint like the input, whose weights and deltas
    add up to the input: train the adapter on it. One matrix is in memory at a time. A
    run that was interrupted goes on with the next file.

    Args:
        checkpoint: .safetensors files, see `open_checkpoint`.
        output: folder to write; it must not exist.
        method: the initializer, as in `Rule`; one that needs no data.
        rank: of every module, or its largest if that is less. None: by energy.
        energy: part of the squared norm of each weight that its rank has to keep. None:
            by rank.
        targets: regular expression, searched in the names of the matrices. None: all
            matrices but embeddings, heads and routers.
        portable: as in `save_peft`.
        key: one typed PRNG key, consumed; folded with each name.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.

    Returns:
        `AdapterReport`; the energy is the part of the weight that the delta holds.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank and energy, a method that needs data,
            damaged files, a weight in fp8, NaN or Inf, no matrix that `targets`
            matches.

    Cost: as `adapt`, and a copy of the files.

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
    wish = check_wish(rank, energy, None)
    _checks.check_key(key)
    initializer = as_initializer(method)
    if initializer.data_meaning is not None and initializer.is_data_required:
        raise ValueError(
            f"`method` must need no data, got {initializer.label!r}, which needs "
            f"{initializer.data_meaning}. Use jlora.adapt."
        )

    source = open_checkpoint(checkpoint)
    is_folder = source.path.is_dir()
    config = read_model_config(source.path)
    for name in source:
        source.locate(name)  # refuses formats whose bytes cannot be copied
    names = [name for name in source if _is_target(source, name, targets)]
    if not names:
        raise ValueError(
            f"{source.path}: must hold a matrix that `targets` matches, got none. "
            "List the names with `jlora show`."
        )

    job = {
        "job": "init",
        "inputs": [identify(path) for path in source.files],
        "method": initializer.label,
        "wish": list(wish),
        "targets": targets,
        "portable": portable,
        "key": jax.random.key_data(key).tolist(),
    }
    run = _Run(source, config, initializer, wish, set(names), key)
    bar = Progress("init", len(source.files), enabled=progress, unit="files")
    with open_output(
        output, inputs=[source.path], num_bytes=2 * source.num_bytes, job=job
    ) as folder:
        try:
            for path in source.files:
                name = path.name if is_folder else "model.safetensors"
                run.write_file(folder, path, name)
                bar.advance(1, name)
        finally:
            bar.close()
        return _finish(folder, run, is_folder, portable)


class _Run:
    """The files of one run: each new base, and the factors that belong to it."""

    def __init__(
        self,
        source: Checkpoint,
        config: Mapping[str, Any],
        initializer: Initializer,
        wish: RankWish,
        names: set[str],
        key: PRNGKey,
    ) -> None:
        self.source = source
        self._config = config
        self._initializer = initializer
        self._wish = wish
        self._names = names
        self._key = key
        self._factors: dict[str, np.ndarray] = {}
        self.files: list[str] = []

    def write_file(self, folder: OutputFolder, path: pathlib.Path, name: str) -> None:
        """Write a file of the base, and `name` of its factors beside it."""
        self._factors = {}
        base, factors = f"base/{name}", f"factors/{name}"
        self.files.append(factors)
        if folder.has(base) and folder.has(factors):
            return
        folder.write(base, functools.partial(self._write_base, path), again=True)
        folder.write(factors, lambda file: write_safetensors(file, self._factors))

    def _write_base(self, path: pathlib.Path, file: BinaryIO) -> None:
        names = [name for name in self.source if self.source.info(name).file == path]
        places = {name: self.source.locate(name) for name in names}
        file.write(
            format_header(
                [
                    (name, place.dtype, place.shape, place.num_bytes)
                    for name, place in places.items()
                ]
            )
        )
        with open(path, "rb") as old:
            for name, place in places.items():
                if name in self._names:
                    write_array(file, self._adapt(name))
                else:
                    copy_range(old.fileno(), file, place.start, place.num_bytes)

    def _adapt(self, name: str) -> np.ndarray:
        """Return the base of one weight, and keep its factors."""
        w = self.source[name]
        module = find_module(name)
        is_io = is_inputs_first(module, self._config.get("model_type"))
        rank: int | RankRule = RankRule("energy", energy=self._wish.energy or 0.9)
        if self._wish.rank is not None:
            rank = min(self._wish.rank, self._initializer.max_rank(*w.shape))
        rule = Rule("^w$", rank, init=self._initializer, layout="io" if is_io else "oi")
        tree = {"w": w}
        with jax.enable_x64(w.dtype == np.float64):
            plan = make_plan(tree, rule, key=self._key)
            key = jax.random.fold_in(self._key, _hash_name(name))
            adapted = adapt(tree, plan, key=key, progress=False)["w"]
            u, v = (np.asarray(part) for part in adapted.factors)
        self._factors |= {f"{module}.u": u, f"{module}.v": v}
        return np.asarray(adapted.base)


def _finish(
    folder: OutputFolder, run: _Run, is_folder: bool, portable: bool
) -> AdapterReport:
    """Write the adapter and the side files, and drop what only the run needed."""
    factors: dict[str, Factors] = {}
    for name in run.files:
        arrays = open_checkpoint(folder.path / name)
        for module in sorted({tensor.rpartition(".")[0] for tensor in arrays}):
            factors[module] = make_pair(arrays[f"{module}.u"], arrays[f"{module}.v"])

    tensors, content = format_adapter(factors, portable=portable)
    folder.write(
        f"adapter/{MODEL_NAME}",
        lambda file: write_safetensors(file, tensors),
    )
    folder.write(f"adapter/{CONFIG_NAME}", lambda file: write_json(file, content))

    report, has_moved = report_adapted(run.source, folder.path / "base", factors)
    if has_moved and is_folder:
        for path in find_side_files(run.source.path):
            folder.write(f"base/{path.name}", functools.partial(copy_file, path))
    if not has_moved:
        folder.drop("base")
    folder.drop("factors")
    return report


def _is_target(source: Checkpoint, name: str, targets: str | None) -> bool:
    info = source.info(name)
    is_float = is_floating(info.dtype) or is_fp8(info.dtype)
    if len(info.shape) != 2 or 0 in info.shape or not is_float or is_one_expert(name):
        return False
    if targets is None:
        is_embedding = re.search(EMBEDDINGS, find_module(name)) is not None
        is_chosen = not is_embedding and re.search(_NOT_TARGETS, name) is None
    else:
        is_chosen = re.search(targets, name) is not None
    if is_chosen:
        check_changeable(info.file, name, info.dtype)
    return is_chosen


def _hash_name(name: str) -> int:
    """Return 32 bits of a name, the same in every process."""
    return zlib.crc32(name.encode())
