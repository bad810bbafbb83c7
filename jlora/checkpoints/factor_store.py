"""Singular triplets of a job on disk, between computing them and choosing ranks.

Only the singular values are in memory when the ranks are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jlora._types import Float
from jlora.checkpoints.adapter_layout import (
    AdapterLayout,
    FactorShape,
    plan_adapter,
)
from jlora.checkpoints.adapter_ranks import (
    AdapterReport,
    ModuleReport,
    RankWish,
    choose_ranks,
    report_module,
)
from jlora.checkpoints.modules import MatrixRef, StoredModule
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.window_store import WindowStore
from jlora.factors import SVD, Factors, split_svd


class Part(NamedTuple):
    """The leading triplets of one matrix, as NumPy arrays."""

    svd: SVD  # u [inputs, k], s [k], vt [k, outputs]
    rest: float  # Frobenius norm of the residual


class Spectrum(NamedTuple):
    """The singular values of a module; for experts, the norms over all of them."""

    values: Float[np.ndarray, " k"]  # the leading ones
    rest: float  # Frobenius norm of the residual


def put_parts(store: WindowStore, number: int, parts: Mapping[str, Part]) -> None:
    """Write the parts of a window, by the names of their matrices."""
    arrays: dict[str, Any] = {}
    for name, (svd, rest) in parts.items():
        arrays[f"{name}/rest"] = np.asarray(rest, np.float64)
        arrays[f"{name}/s"] = np.asarray(svd.s)
        if rest or np.any(svd.s):  # else nothing changed
            arrays |= {f"{name}/u": svd.u, f"{name}/vt": svd.vt}
    store.put(number, arrays)


def read_spectra(
    store: WindowStore, modules: Iterable[StoredModule]
) -> dict[str, Spectrum]:
    """Return the spectrum of each module that is not zero."""
    spectra = {}
    for module in modules:
        parts = []
        for i in range(module.num_matrices):
            ref = MatrixRef(module, i)
            window = store.open_window(ref)
            parts.append((window[f"{ref.name}/s"], window[f"{ref.name}/rest"]))
        # Experts share one rank, so their energies are added.
        values = np.linalg.norm([np.float64(values) for values, _ in parts], axis=0)
        rest = float(np.linalg.norm([rest for _, rest in parts]))
        if rest or values.any():
            spectra[module.path] = Spectrum(values, rest)
    return spectra


def make_factor_reader(
    store: WindowStore, modules: Iterable[StoredModule], ranks: Mapping[str, int]
) -> Callable[[str], Factors]:
    """Return the function that gives the factors of a module: stacked for experts."""
    return make_stack_reader(
        modules, lambda ref: _read_pair(store, ref, ranks[ref.module.path])
    )


def make_stack_reader(
    modules: Iterable[StoredModule], read_pair: Callable[[MatrixRef], Factors]
) -> Callable[[str], Factors]:
    """Return the function that gives the factors of a module: stacked for experts."""
    by_path = {module.path: module for module in modules}

    def read(path: str) -> Factors:
        module = by_path[path]
        pairs = [read_pair(MatrixRef(module, i)) for i in range(module.num_matrices)]
        if module.num_experts is None:
            return pairs[0]
        return make_pair(*(np.stack(parts) for parts in zip(*pairs, strict=True)))

    return read


def _read_pair(store: WindowStore, ref: MatrixRef, rank: int) -> Factors:
    window, name = store.open_window(ref), ref.name
    if f"{name}/u" not in window:  # an expert that did not change
        (m, n), dtype = ref.module.shape, window[f"{name}/s"].dtype
        return make_pair(np.zeros((m, rank), dtype), np.zeros((rank, n), dtype))
    parts: list[Any] = [window[f"{name}/{part}"] for part in ("u", "s", "vt")]
    u, s, vt = parts
    thin = SVD(u[:, :rank], s[:rank], vt[:rank])
    return make_pair(*map(np.asarray, split_svd(thin, "both")))


def choose_module_ranks(
    spectra: Mapping[str, Spectrum],
    modules: Iterable[StoredModule],
    wish: RankWish,
    old_ranks: Mapping[str, int],
) -> tuple[dict[str, int], AdapterReport]:
    """Return {module: rank above 0}, and the report of all modules that change.

    Args:
        spectra: of the modules.
        modules: of the job.
        wish: how to choose.
        old_ranks: for the report; a module without one has its smaller size.
    """
    by_path = {module.path: module for module in modules}
    values = {path: spectrum.values for path, spectrum in spectra.items()}
    rests = {path: spectrum.rest for path, spectrum in spectra.items()}
    shapes = {path: by_path[path].shape for path in spectra}
    ranks = choose_ranks(wish, values, shapes, rests)

    rows: list[ModuleReport] = []
    skipped = []
    for path, (own, rest) in spectra.items():
        rank = ranks[path]
        if rank:
            old_rank = old_ranks.get(path, min(shapes[path]))
            rows.append(report_module(path, own, rest, old_rank, rank))
        else:
            skipped.append((path, "gets rank 0"))
    kept = {path: rank for path, rank in ranks.items() if rank}
    return kept, AdapterReport(tuple(rows), tuple(skipped))


def plan_stored_adapter(
    modules: Iterable[StoredModule],
    ranks: Mapping[str, int],
    *,
    portable: bool,
    dtypes: Mapping[str, np.dtype] = MappingProxyType({}),
) -> AdapterLayout:
    """Return the layout of an adapter of the modules that have a rank.

    Args:
        modules: of the job.
        ranks: by module.
        portable: as in `save_peft`.
        dtypes: by module; float32 where it has none.
    """
    shapes = {}
    for module in modules:
        path = module.path
        if path in ranks:
            dtype = dtypes.get(path, np.dtype(np.float32))
            shapes[path] = FactorShape(
                *module.shape, ranks[path], module.num_experts, dtype
            )
    return plan_adapter(shapes, portable=portable)
