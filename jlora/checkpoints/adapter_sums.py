"""Weighted sums of the factors of adapters, and their singular triplets."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._progress import Progress
from jlora.adaptation.chunks import fit_chunk_size
from jlora.checkpoints.factor_store import Part, put_parts
from jlora.checkpoints.memory import check_fits, find_work_bytes
from jlora.checkpoints.modules import MatrixRef, StoredModule
from jlora.checkpoints.peft_file import (
    PeftFile,
    check_only_factors,
    make_pair,
    open_peft,
)
from jlora.checkpoints.window_store import WindowStore
from jlora.factors import SVD, Factors
from jlora.updates.recompression import concatenate_factors, recompress

Terms = Sequence[tuple[PeftFile, float]]  # adapters and their weights


def list_weighted(adapters: Mapping[Any, float]) -> list[tuple[pathlib.Path, float]]:
    """Return [(folder, weight)] of {folder: weight}, checked."""
    if not adapters:
        raise ValueError("`adapters` must name at least one, got none. Pass a folder.")
    return [
        (pathlib.Path(path), float(_checks.check_scalar(weight, f"weight of {path}")))
        for path, weight in adapters.items()
    ]


def open_terms(
    weighted: Sequence[tuple[pathlib.Path, float]],
) -> tuple[dict[str, Terms], list[StoredModule]]:
    """Return {module: the adapters that change it}, and the modules.

    Raises:
        OSError, ValueError: as `load_peft`, or modules of other shapes.
    """
    terms: dict[str, list[tuple[PeftFile, float]]] = {}
    for path, weight in weighted:
        file = open_peft(path)
        check_only_factors(file)
        for module in file.modules:
            terms.setdefault(module, []).append((file, weight))
    return dict(terms), [_make_module(path, parts) for path, parts in terms.items()]


def find_dtypes(terms: Mapping[str, Terms]) -> dict[str, np.dtype]:
    """Return {module: dtype to write}: the one of all its factors, else float32."""
    dtypes = {}
    for path, parts in terms.items():
        stored = {file.find_dtype(path) for file, _ in parts}
        is_one = len(stored) == 1 and stored != {"float64"}
        dtypes[path] = np.dtype(stored.pop() if is_one else np.float32)
    return dtypes


def read_sum(terms: Terms, path: str) -> Factors:
    """Return factors of Σ weight · u @ v of one module, of the sum of the ranks."""
    pairs = [file.read(path) for file, _ in terms]
    weights = [weight for _, weight in terms]
    if weights == [1.0]:
        return pairs[0]
    on_device = [Factors(jnp.asarray(u), jnp.asarray(v)) for u, v in pairs]
    return make_pair(*map(np.asarray, concatenate_factors(on_device, weights)))


def check_sum_memory(
    modules: Iterable[StoredModule], ranks: Mapping[str, int], max_memory: int | None
) -> None:
    """Refuse the first module whose factors do not fit in the memory of a job."""
    for module in modules:
        needed = module.num_matrices * _count_bytes(module, ranks[module.path])
        check_fits(max_memory, needed, module.path)


def fill_sums(
    store: WindowStore,
    terms: Mapping[str, Terms],
    rank: int | None,
    max_memory: int | None,
    bar: Progress,
) -> None:
    """Write the singular triplets of the sums that the store does not hold yet.

    Args:
        store: of the job.
        terms: by module.
        rank: number of vectors to keep of each; all singular values are kept. None: all
            vectors.
        max_memory: of the job in bytes.
        bar: shows the matrices.
    """
    read = functools.lru_cache(1)(lambda path: read_sum(terms[path], path))
    for number, window in store.list_missing(bar):
        parts: dict[str, Part] = {}
        for ref, svd in _decompose_window(window, read, max_memory):
            thin = SVD(svd.u[:, :rank], svd.s, svd.vt[:rank])
            parts[ref.name] = Part(thin, 0.0)
            bar.count(1, svd.u.nbytes + svd.vt.nbytes)
        put_parts(store, number, parts)


def _decompose_window(
    window: Sequence[MatrixRef],
    read: Callable[[str], Factors],
    max_memory: int | None,
) -> Iterator[tuple[MatrixRef, SVD]]:
    """Yield the triplets of each matrix; neighbours of one shape run as one batch."""

    def identify(ref: MatrixRef) -> tuple:
        return ref.module.shape, read(ref.module.path).u.shape[-1]

    for (_, rank), refs in itertools.groupby(window, identify):
        group = list(refs)
        first = group[0].module
        needed = _count_bytes(first, rank)
        elements = rank * sum(first.shape)
        size = fit_chunk_size(elements, needed, find_work_bytes(max_memory))
        for start in range(0, len(group), size):
            yield from _decompose(group[start : start + size], read)


def _decompose(
    chunk: Sequence[MatrixRef], read: Callable[[str], Factors]
) -> list[tuple[MatrixRef, SVD]]:
    us, vs = [], []
    for ref in chunk:
        u, v = read(ref.module.path)
        is_stack = ref.module.num_experts is not None
        us.append(u[ref.index] if is_stack else u)
        vs.append(v[ref.index] if is_stack else v)
    m, n, rank = *chunk[0].module.shape, us[0].shape[-1]
    pair = Factors(jnp.asarray(np.stack(us)), jnp.asarray(np.stack(vs)))
    found = jax.device_get(recompress(pair, min(m, n, rank)))
    return [
        (ref, SVD(found.u[i], found.s[i], found.vt[i])) for i, ref in enumerate(chunk)
    ]


def _count_bytes(module: StoredModule, rank: int) -> int:
    """Return the bytes of the factors of one matrix, and of work on them."""
    return 24 * rank * sum(module.shape)


def _make_module(path: str, terms: Terms) -> StoredModule:
    """Return a module of the shape that all its terms have."""
    places = [file.modules[path] for file, _ in terms]
    shapes = {(p.num_experts, p.num_inputs, p.num_outputs) for p in places}
    if len(shapes) > 1:
        raise ValueError(
            f"{path}: `adapters` must be of one model, got factors of the shapes "
            f"{sorted(map(str, shapes))}. Combine adapters of the same model."
        )
    place = places[0]
    shape = (place.num_inputs, place.num_outputs)
    return StoredModule(path, (), shape, place.num_experts, "io", "float32")
