"""The first factors of the weights of a checkpoint, a few matrices at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._numerics import frobenius_norm, to_compute
from jlora._progress import Progress
from jlora._types import Array, PRNGKey
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.batching import adapt
from jlora.adaptation.plan import make_plan
from jlora.adaptation.rule import Rule
from jlora.checkpoints.adapter_ranks import AdapterReport, ModuleReport
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.factor_store import make_stack_reader
from jlora.checkpoints.memory import check_fits, find_work_bytes
from jlora.checkpoints.modules import MatrixRef, StoredModule, read_matrix
from jlora.checkpoints.peft_file import make_pair
from jlora.checkpoints.quantized_bases import list_base_tensors
from jlora.checkpoints.window_store import WindowStore
from jlora.factors import Factors
from jlora.initializers.base import Initializer
from jlora.initializers.lookup import as_initializer
from jlora.quantization.base import Format
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import read_array

# Bytes of matrices that are adapted together: enough to fill a device.
_GROUP_BYTES = 2**28


class BaseStorage(NamedTuple):
    """How the bases of a job are stored."""

    format: Format | None  # None: in the dtype of the model
    is_foreign: bool  # whether their tensors have the names of bitsandbytes


def check_method(method: str | Initializer | Callable) -> Initializer:
    """Return the initializer of a method whose factors a PEFT adapter can hold."""
    initializer = as_initializer(method)
    if initializer.data_meaning is not None and initializer.is_data_required:
        raise ValueError(
            f"`method` must need no data, got {initializer.label!r}, which needs "
            f"{initializer.data_meaning}. Use jlora.adapt."
        )
    trainable = initializer.trainable[0]
    if trainable in ("core", "s") or not initializer.keeps_residual:
        raise ValueError(
            "`method` must give a base and two factors, as a PEFT adapter has, got "
            f"{initializer.label!r}. Use jlora.adapt."
        )
    return initializer


def check_stacks(initializer: Initializer, modules: Iterable[StoredModule]) -> None:
    """Refuse experts for a method whose bases have to be stored."""
    for module in modules:
        if module.num_experts is not None and not initializer.has_residual_base:
            raise ValueError(
                f"{module.path}: `method` must have the base w - u @ v for stacked "
                f"experts, got {initializer.label!r}. Leave them out of `targets`."
            )


def check_memory(
    modules: Iterable[StoredModule], rank: int, max_memory: int | None
) -> None:
    """Refuse the first module whose matrices do not fit in the memory of a job."""
    for module in modules:
        # As stored: the matrix and its base, on the host and on the device. In float32:
        # the matrix and its scaled copy.
        itemsize = 4 * np.dtype(module.dtype).itemsize + 8
        needed = itemsize * module.num_elements + 32 * rank * sum(module.shape)
        check_fits(max_memory, needed, module.path)


def fill_initial_factors(
    store: WindowStore,
    source: Checkpoint,
    initializer: Initializer,
    ranks: Mapping[str, int],
    storage: BaseStorage,
    key: PRNGKey,
    max_memory: int | None,
    bar: Progress,
) -> None:
    """Write the first factors of the matrices that the store does not hold yet.

    Args:
        store: of the job.
        source: the model.
        initializer: of all the matrices.
        ranks: by module.
        storage: of the bases.
        key: folded with the name of each matrix.
        max_memory: of the job in bytes.
        bar: shows the matrices.

    Raises:
        ValueError: NaN or Inf in a weight.
    """
    limit = find_work_bytes(max_memory)
    for number, window in store.list_missing(bar):
        arrays: dict[str, np.ndarray] = {}
        for group in _split(window, limit):
            arrays |= _adapt_group(
                source, group, initializer, ranks, storage, key, limit
            )
            for ref in group:
                itemsize = np.dtype(ref.module.dtype).itemsize
                bar.count(1, itemsize * ref.module.num_elements)
        store.put(number, arrays)


def make_initial_reader(
    store: WindowStore, modules: Iterable[StoredModule]
) -> Callable[[str], Factors]:
    """Return the function that gives the factors of a module: stacked for experts."""
    return make_stack_reader(
        modules, lambda ref: make_pair(*(_read(store, ref, part) for part in "uv"))
    )


def report_initial_factors(
    store: WindowStore, modules: Iterable[StoredModule], ranks: Mapping[str, int]
) -> AdapterReport:
    """Return the report of the part of each weight that its factors hold."""
    rows = []
    for module in modules:
        if module.path not in ranks:
            continue
        refs = [MatrixRef(module, i) for i in range(module.num_matrices)]
        norms = np.linalg.norm([_read(store, ref, "norms") for ref in refs], axis=0)
        total, left = float(norms[0]), float(norms[1])
        error = left / total if total else 0.0
        energy = max(1 - error**2, 0.0)
        old_rank, rank = min(module.shape), ranks[module.path]
        rows.append(ModuleReport(module.path, old_rank, rank, energy, error))
    return AdapterReport(tuple(rows))


def _read(store: WindowStore, ref: MatrixRef, part: str) -> np.ndarray:
    return store.open_window(ref)[f"{ref.name}/{part}"]


def _split(window: Sequence[MatrixRef], limit: int | None) -> Iterator[list[MatrixRef]]:
    """Yield the matrices in groups that fit in memory, each of one kind of dtype."""
    most = _GROUP_BYTES if limit is None else min(_GROUP_BYTES, limit // 12)
    group: list[MatrixRef] = []
    room = most
    for ref in window:
        dtype = np.dtype(ref.module.dtype)
        size = dtype.itemsize * ref.module.num_elements
        is_other = group and (dtype == np.float64) != _is_wide(group)
        if group and (size > room or is_other):
            yield group
            group, room = [], most
        group.append(ref)
        room -= size
    if group:
        yield group


def _is_wide(group: Sequence[MatrixRef]) -> bool:
    return group[0].module.dtype == "float64"


def _adapt_group(
    source: Checkpoint,
    group: Sequence[MatrixRef],
    initializer: Initializer,
    ranks: Mapping[str, int],
    storage: BaseStorage,
    key: PRNGKey,
    limit: int | None,
) -> dict[str, np.ndarray]:
    """Return the arrays to store of some matrices."""
    tree = {ref.name: read_matrix(source, ref) for ref in group}
    rules: dict[tuple[int, str], list[str]] = {}
    for ref in group:
        kind = (ranks[ref.module.path], ref.module.layout)
        rules.setdefault(kind, []).append(re.escape(ref.name))

    arrays: dict[str, np.ndarray] = {}
    with jax.enable_x64(_is_wide(group)):
        plan = make_plan(
            tree,
            [
                Rule(
                    f"^({'|'.join(names)})$",
                    rank,
                    init=initializer,
                    layout=layout,
                    quantize=storage.format,
                )
                for (rank, layout), names in rules.items()
            ],
        )
        try:
            adapted = adapt(tree, plan, key=key, max_bytes=limit, progress=False)
        except ValueError as error:  # NaN, or too little memory
            raise ValueError(f"{source.path}: {error}") from None
        for ref in group:
            weight = adapted[ref.name]
            arrays |= _list_arrays(ref, tree[ref.name], weight, initializer, storage)
    return arrays


def _list_arrays(
    ref: MatrixRef,
    w: np.ndarray,
    weight: AdaptedWeight,
    initializer: Initializer,
    storage: BaseStorage,
) -> dict[str, np.ndarray]:
    name = ref.name
    # The adapter's file holds 32 bits, so the base is computed from rounded factors.
    u, v = (np.asarray(part, np.float32) for part in weight.factors)
    norms = np.asarray(_measure(w, weight.base), np.float64)
    arrays: dict[str, Any] = {f"{name}/u": u, f"{name}/v": v, f"{name}/norms": norms}
    if isinstance(weight.base, QuantizedArray):
        is_foreign = storage.is_foreign
        return arrays | list_base_tensors(ref, weight.base, is_foreign=is_foreign)
    if not initializer.has_residual_base and weight.base is not w:
        arrays[f"{name}/base"] = np.asarray(weight.base)
    return arrays


@jax.jit
def _measure(w: Array, base: Array | QuantizedArray) -> Array:
    """Return the norms of a weight and of its base."""
    parts = (w, read_array(base))
    return jnp.stack([frobenius_norm(to_compute(part)) for part in parts])
