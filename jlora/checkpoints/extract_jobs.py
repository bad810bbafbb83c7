"""`extract_checkpoint`: the difference of two checkpoints as an adapter."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm
from jlora._progress import Progress
from jlora._types import Array, PRNGKey
from jlora.adaptation.paths import fold_path
from jlora.checkpoints.adapter_files import write_adapter
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    RankWish,
    check_wish,
    choose_ranks,
    report_module,
)
from jlora.checkpoints.architectures import find_module, is_inputs_first, is_one_expert
from jlora.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jlora.checkpoints.float_weights import is_floating, is_fp8
from jlora.checkpoints.folders import read_model_config
from jlora.checkpoints.output_folder import check_target
from jlora.checkpoints.peft import format_adapter
from jlora.checkpoints.peft_keys import PREFIX
from jlora.checkpoints.peft_reader import make_pair
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors, split_svd
from jlora.reconstruction.dense import reconstruct

Path = str | os.PathLike[str]

# Enough to keep more energy than torch.svd_lowrank with niter=4, in half of its time.
_NUM_PASSES = 10


class _Found(NamedTuple):
    """The leading part of one change."""

    svd: SVD  # NumPy arrays
    shape: tuple[int, int]  # (inputs, outputs)
    rest: float  # Frobenius norm of what is beyond these triplets


def extract_checkpoint(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int = 256,
    targets: str = ".*",
    modules_to_save: str | None = None,
    portable: bool = True,
    key: PRNGKey,
    progress: bool | None = None,
) -> AdapterReport:
    """Write the difference of two checkpoints as a PEFT adapter, and return a report.

    Each matrix of the difference is subtracted in float32 and truncated to its leading
    singular triplets. One matrix of each checkpoint is in memory at a time. Weights in
    fp8 are dequantised with their scales, see `Checkpoint.read_dequantized`.

    Args:
        base: checkpoint before fine-tuning, see `open_checkpoint`.
        tuned: checkpoint after it.
        output: folder to write; it must not exist.
        rank: of every module. None: not by rank.
        energy: part of the squared norm to keep of each change. None: not by energy.
        budget: numbers in all the factors. None: not by budget.
        max_rank: static, largest rank that `energy` and `budget` may give.
        targets: regular expression, searched in the names of the matrices.
        modules_to_save: regular expression, searched in the names of what is no matrix
            or no target: if it changed, it is stored whole. None: nothing is.
        portable: as in `save_peft`.
        key: one typed PRNG key, consumed; folded with each name.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.

    Returns:
        `AdapterReport`. What differs between the checkpoints and is not in the adapter
        is listed in `skipped`: tensors of one side only, of another shape, vectors.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank, energy and budget, damaged files, NaN or
            Inf, a weight in fp8 without its scale, nothing that differs.

    Cost: one `randomized_svd` of each matrix.

    Accuracy: as `randomized_svd` with ten passes: up to a thousandth of the energy
        beside the best factors. The energies are relative to the whole change.

    Example:
        >>> import jax, numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> old, new = (f"{folder.name}/{name}.safetensors" for name in ("old", "new"))
        >>> jlora.save_arrays(old, {"layers.0.q_proj.weight": np.eye(4)})
        >>> jlora.save_arrays(new, {"layers.0.q_proj.weight": np.eye(4) + 1})
        >>> report = jlora.checkpoints.extract_checkpoint(
        ...     old, new, f"{folder.name}/adapter", rank=1, key=jax.random.key(0),
        ...     progress=False)
        >>> round(report.modules[0].energy, 4)
        1.0
        >>> folder.cleanup()
    """
    wish = check_wish(rank, energy, budget)
    _checks.check_key(key)
    max_rank = wish.rank or _checks.check_integer(max_rank, "max_rank")
    old, new = open_checkpoint(base), open_checkpoint(tuned)
    folder = pathlib.Path(output).absolute()
    check_target(folder, [old.path, new.path])
    config = read_model_config(new.path) or read_model_config(old.path)

    found: dict[str, _Found] = {}
    saved: dict[str, np.ndarray] = {}
    scales = {*old.scales.values(), *new.scales.values()}  # read with their weights
    names = [name for name in new if name not in scales]
    gone = [name for name in old if name not in new and name not in scales]
    skipped = [(name, "is in the base only") for name in gone]
    bar = Progress("extract", len(names), enabled=progress, unit="tensors")
    waiting = 0
    try:
        for name in names:
            reason = _why_not(old, new, name, targets)
            if reason is None:
                change = _decompose(old, new, name, config, max_rank, key)
                if change is not None:
                    found[find_module(name)] = change
            elif modules_to_save is not None and re.search(modules_to_save, name):
                if _differs(old, new, name):
                    saved[name] = _read(new, name)
            elif _differs(old, new, name):
                skipped.append((name, reason))
            waiting += 1
            if bar.is_due(waiting):
                bar.advance(waiting, name)
                waiting = 0
        bar.advance(waiting, "")
    finally:
        bar.close()
    if not found and not saved:
        raise ValueError(
            f"{new.path}: must differ from {old.path} in a matrix that `targets` "
            "matches, got no difference. Check the two paths."
        )

    factors, report = _cut(found, wish)
    if factors:
        tensors, content = format_adapter(factors, portable=portable)
    else:
        raise ValueError(
            f"{new.path}: must differ in a matrix of a rank above 0, got none. "
            "Raise the budget."
        )
    tensors |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    if saved:
        names = sorted({name.rpartition(".")[0] for name in saved})
        content["modules_to_save"] = names
    write_adapter(folder, tensors, content)
    return report._replace(skipped=(*report.skipped, *skipped))


def _why_not(old: Checkpoint, new: Checkpoint, name: str, targets: str) -> str | None:
    """Return why a tensor has no factors, or None if it can have some."""
    if name not in old:
        return "is in the tuned checkpoint only"
    one, other = old.info(name), new.info(name)
    if one.shape != other.shape:
        return f"has the shape {one.shape} in the base and {other.shape} after it"
    if is_one_expert(name):
        return "is one of many experts, which PEFT adapts as a stack"
    if not all(is_floating(d) or is_fp8(d) for d in (one.dtype, other.dtype)):
        return f"has the dtypes {one.dtype} and {other.dtype}"
    if len(one.shape) != 2 or 0 in one.shape:
        return f"has the shape {one.shape}, which is no matrix"
    return None if re.search(targets, name) else "is no target"


def _differs(old: Checkpoint, new: Checkpoint, name: str) -> bool:
    """Return whether a tensor or its scale has other bytes."""
    if name not in old or old.info(name)[:2] != new.info(name)[:2]:
        return True
    if old[name].tobytes() != new[name].tobytes():
        return True
    scale = new.scales.get(name)
    return scale is not None and _differs(old, new, scale)


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Return a tensor, in its dtype or dequantised to float32 if that is fp8."""
    if is_fp8(checkpoint.info(name).dtype):
        return checkpoint.read_dequantized(name)
    return checkpoint[name]


def _decompose(
    old: Checkpoint,
    new: Checkpoint,
    name: str,
    config: Mapping[str, Any],
    max_rank: int,
    key: PRNGKey,
) -> _Found | None:
    """Return the leading triplets of one change, or None if there is none."""
    w, w_old = _read(new, name), _read(old, name)
    count = min(max_rank, *w.shape)
    svd, rest, is_finite = jax.device_get(
        _decompose_difference(w, w_old, fold_path(key, name), count)
    )
    if not is_finite:
        raise ValueError(
            f"{new.path}: must be finite, got NaN or Inf in the change of {name}. "
            "Train it again."
        )
    if not svd.s.any() and rest == 0:
        return None

    # From inputs to outputs: the factors of the transpose are these, exchanged.
    module, model_type = find_module(name), config.get("model_type")
    if not is_inputs_first(module, model_type):
        svd = SVD(svd.vt.T, svd.s, svd.u.T)
    return _Found(svd, (svd.u.shape[0], svd.vt.shape[1]), float(rest))


@functools.partial(jax.jit, static_argnames="rank")
def _decompose_difference(
    new: Array, old: Array, key: PRNGKey, rank: int
) -> tuple[SVD, Array, Array]:
    """Return the leading triplets of new - old, the norm of the rest, and "finite"."""
    delta = new.astype(jnp.float32) - old.astype(jnp.float32)
    svd = randomized_svd(delta, rank, key=key, num_passes=_NUM_PASSES)
    residual = reconstruct(split_svd(svd, "both"), delta, scale=-1.0)
    return svd, frobenius_norm(residual), jnp.isfinite(delta).all()


def _cut(
    found: Mapping[str, _Found], wish: RankWish
) -> tuple[dict[str, Factors], AdapterReport]:
    """Return the factors of the ranks of a wish, and the report of them."""
    spectra = {
        module: np.asarray(part.svd.s, np.float64) for module, part in found.items()
    }
    shapes = {module: part.shape for module, part in found.items()}
    rests = {module: part.rest for module, part in found.items()}
    ranks = choose_ranks(wish, spectra, shapes, rests)

    factors, rows, skipped = {}, [], []
    for module, (svd, shape, rest) in found.items():
        rank = ranks[module]
        if rank == 0:
            skipped.append((module, "gets rank 0"))
            continue
        thin = SVD(svd.u[:, :rank], svd.s[:rank], svd.vt[:rank])
        factors[module] = make_pair(*map(np.asarray, split_svd(thin, "both")))
        rows.append(report_module(module, spectra[module], rest, min(shape), rank))
    return factors, AdapterReport(tuple(rows), tuple(skipped))
