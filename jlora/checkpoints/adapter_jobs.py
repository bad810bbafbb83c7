"""`resize_adapter` and `combine_adapters`: adapters from adapters."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    ModuleReport,
    RankWish,
    check_wish,
    choose_ranks,
    report_module,
)
from jlora.checkpoints.peft import load_peft, save_peft
from jlora.checkpoints.peft_reader import make_pair
from jlora.factors import Factors, split_svd
from jlora.updates.recompression import concatenate_factors, recompress

Path = str | os.PathLike[str]

# What the new configuration takes from that of the first adapter.
_KEPT = ("base_model_name_or_path", "task_type", "revision")


def resize_adapter(
    adapter: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    portable: bool = True,
) -> AdapterReport:
    """Write an adapter with smaller ranks, and return what was kept of each module.

    Each u @ v becomes its best approximation of the new rank, without ever being
    formed.

    Args:
        adapter: folder of PEFT.
        output: folder to write, see `save_peft`.
        rank: of every module (or what it has, if that is less). None: not by rank.
        energy: part of the squared norm to keep of each module, in (0, 1]. None: not by
            energy.
        budget: numbers in all the factors; ranks go where they keep most. None: not by
            budget.
        portable: as in `save_peft`.

    Returns:
        `AdapterReport`; a module of rank 0 is left out.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: not exactly one of rank, energy and budget, or what `load_peft` and
            `save_peft` refuse.

    Accuracy: as `recompress`.

    Example:
        >>> import jax, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> old, new = f"{folder.name}/old", f"{folder.name}/new"
        >>> u = jax.random.normal(jax.random.key(0), (8, 4))
        >>> jlora.save_peft(old, {"q_proj": jlora.Factors(u, u.T)})
        >>> report = jlora.checkpoints.resize_adapter(old, new, rank=2)
        >>> report.modules[0].old_rank, report.modules[0].rank
        (4, 2)
        >>> folder.cleanup()
    """
    wish = check_wish(rank, energy, budget)
    factors, config = load_peft(adapter)
    cut, report = _cut(factors, wish)
    _write(output, cut, config, portable)
    return report


def combine_adapters(
    adapters: Mapping[Any, float],
    output: Path,
    *,
    rank: int | None = None,
    portable: bool = True,
) -> AdapterReport:
    """Write the weighted sum of adapters as one adapter, and return what was kept.

    The deltas are added, Σ wᵢ uᵢ vᵢ. PEFT's "linear" adds the factors, which also gives
    the cross terms uᵢ vⱼ.

    Args:
        adapters: {folder: weight}. A module that some do not have is taken from the
            others.
        output: folder to write, see `save_peft`.
        rank: truncate the sum to this rank. None: exact, with the sum of the ranks.
        portable: as in `save_peft`.

    Returns:
        `AdapterReport`.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: no adapter, modules of other shapes, or what `load_peft` and
            `save_peft` refuse.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> one, two, new = (f"{folder.name}/{i}" for i in range(3))
        >>> for path in (one, two):
        ...     ones = jlora.Factors(jnp.ones((2, 1)), jnp.ones((1, 2)))
        ...     jlora.save_peft(path, {"q_proj": ones})
        >>> _ = jlora.checkpoints.combine_adapters({one: 0.5, two: 2.0}, new, rank=1)
        >>> u, v = jlora.load_peft(new)[0]["q_proj"]
        >>> float((u @ v)[0, 0].round(5))
        2.5
        >>> folder.cleanup()
    """
    if not adapters:
        raise ValueError("`adapters` must name at least one, got none. Pass a folder.")
    parts: dict[str, list[tuple[Factors, float]]] = {}
    configs: list[dict[str, Any]] = []
    for path, weight in adapters.items():
        number = float(_checks.check_scalar(weight, f"weight of {path}"))
        factors, config = load_peft(path)
        configs.append(config)
        for module, pair in factors.items():
            parts.setdefault(module, []).append((pair, number))

    summed = {module: _sum(module, pairs) for module, pairs in parts.items()}
    if rank is None:
        ranks = {module: pair.u.shape[-1] for module, pair in summed.items()}
        rows = [ModuleReport(module, r, r, 1.0, 0.0) for module, r in ranks.items()]
        _write(output, summed, configs[0], portable)
        return AdapterReport(tuple(rows))
    cut, report = _cut(summed, check_wish(rank, None, None))
    _write(output, cut, configs[0], portable)
    return report


def _sum(module: str, pairs: list[tuple[Factors, float]]) -> Factors:
    shapes = {(pair.u.shape[:-1], pair.v.shape[-1:]) for pair, _ in pairs}
    if len(shapes) > 1:
        raise ValueError(
            f"{module}: `adapters` must be of one model, got factors of the shapes "
            f"{sorted(map(str, shapes))}. Combine adapters of the same model."
        )
    weights = [weight for _, weight in pairs]
    found = concatenate_factors([_to_device(pair) for pair, _ in pairs], weights)
    return make_pair(*map(np.asarray, found))


def _cut(
    factors: Mapping[str, Factors], wish: RankWish
) -> tuple[dict[str, Factors], AdapterReport]:
    """Return factors of the ranks of a wish, and the report of them."""
    svds, spectra, shapes = {}, {}, {}
    for module, pair in factors.items():
        *_, m, r = pair.u.shape
        n = pair.v.shape[-1]
        svd = recompress(_to_device(pair), min(m, n, r))
        svds[module] = svd
        # Experts share one rank: the values of all of them, place by place.
        values = np.asarray(svd.s, np.float64).reshape(-1, svd.s.shape[-1])
        spectra[module] = np.linalg.norm(values, axis=0)
        shapes[module] = (m, n)

    ranks = choose_ranks(wish, spectra, shapes, dict.fromkeys(svds, 0.0))
    cut, rows, skipped = {}, [], []
    for module, svd in svds.items():
        old_rank, rank = factors[module].u.shape[-1], ranks[module]
        if rank == 0:
            skipped.append((module, "gets rank 0"))
            continue
        thin = svd._replace(
            u=svd.u[..., :rank], s=svd.s[..., :rank], vt=svd.vt[..., :rank, :]
        )
        dtype = factors[module].u.dtype
        pair = (np.asarray(part).astype(dtype) for part in split_svd(thin, "both"))
        cut[module] = make_pair(*pair)
        rows.append(report_module(module, spectra[module], 0.0, old_rank, rank))
    return cut, AdapterReport(tuple(rows), tuple(skipped))


def _to_device(factors: Factors) -> Factors:
    return Factors(jnp.asarray(factors.u), jnp.asarray(factors.v))


def _write(
    output: Path,
    factors: Mapping[str, Factors],
    config: Mapping[str, Any],
    portable: bool,
) -> None:
    kept = {name: config[name] for name in _KEPT if config.get(name) is not None}
    save_peft(pathlib.Path(output), factors, portable=portable, config=kept)
