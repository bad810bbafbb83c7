"""Runs one program over all matrices of a group, chunk by chunk.

A chunk is stacked, decomposed as one batch, and sliced again. Its size follows from the
shape of the matrices and never from their number, so that another layer changes neither
the program nor the bits of any other layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import compute_dtype
from jlora._progress import Progress
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.programs import (
    InitializedMatrix,
    compile_chunk,
    compile_donated_chunk,
)
from jlora.adaptation.tasks import MatrixRef, WeightTask, is_concrete, take_data
from jlora.adaptation.weight_builder import WeightBuilder

# Elements in a chunk that keep a device busy. One matrix keeps a CPU busy, and stacking
# only copies: 56 matrices of a model took 1.1 to 1.3 times as long in stacks of 8.
_CHUNK_ELEMENTS = {"cpu": 1, "gpu": 2**25, "tpu": 2**25}
_CPU_BYTES = 2**30

_Chunk = tuple[MatrixRef, ...]
# (ws, scales, keys, datas) of a chunk -> the results of its matrices
RunChunk: TypeAlias = Callable[..., tuple[InitializedMatrix, ...]]


def choose_chunk_size(
    task: WeightTask, max_bytes: int | None = None, platform: str | None = None
) -> int:
    """Return how many matrices of the task are decomposed at once."""
    elements = math.prod(task.matrix_shape)
    dtype = jnp.dtype(task.leaf.dtype)
    # The matrix in the chunk, and the residual beside it in the compute dtype.
    needed = elements * (dtype.itemsize + 2 * compute_dtype(dtype).itemsize)
    if max_bytes is not None and needed > max_bytes:
        raise ValueError(
            f"{task.entry.path}: `max_bytes` must hold one matrix and its work space, "
            f"{needed} bytes, got {max_bytes}. Raise it."
        )

    return fit_chunk_size(elements, needed, max_bytes, platform)


def fit_chunk_size(
    elements: int, needed: int, max_bytes: int | None, platform: str | None = None
) -> int:
    """Return how many matrices keep a device busy and fit into its memory.

    Args:
        elements: of one matrix.
        needed: bytes of one matrix and its work space.
        max_bytes: of a chunk. None: a part of the device's free memory.
        platform: of JAX. None: the default one.
    """
    platform = jax.default_backend() if platform is None else platform
    fills_device = _CHUNK_ELEMENTS.get(platform, 2**25) // elements
    limit = _find_free_bytes() if max_bytes is None else max_bytes
    return max(1, min(fills_device, limit // needed))


def _find_free_bytes() -> int:
    """Return a quarter of the device's free memory, or 1 GiB if it reports none."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _CPU_BYTES
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 4


def adapt_group(
    tasks: list[WeightTask], size: int, bar: Progress, run: RunChunk | None = None
) -> dict[str, AdaptedWeight]:
    """Return {path: AdaptedWeight} of tasks that share a program, chunk by chunk.

    `run` takes and returns what `initialize_chunk` does. None: on one device.
    """
    run = _choose_program(tasks[0]) if run is None else run
    builders = {task.entry.path: WeightBuilder(task) for task in tasks}
    refs = (MatrixRef(task, i) for task in tasks for i in range(task.num_matrices))

    # One chunk is computed while the next is sent; on a CPU both would need memory.
    max_waiting = 0 if jax.default_backend() == "cpu" else 1
    waiting: list[tuple[_Chunk, tuple[InitializedMatrix, ...]]] = []
    for chunk in _split_into_chunks(refs, size):
        waiting.append((chunk, _dispatch(chunk, builders, size, run)))
        if len(waiting) > max_waiting:
            chunk, results = waiting.pop(0)
            _collect(chunk, results, builders, bar)
    while waiting:
        chunk, results = waiting.pop(0)
        _collect(chunk, results, builders, bar)

    return {path: builder.build() for path, builder in builders.items()}


def _split_into_chunks(
    refs: Iterable[MatrixRef], size: int
) -> Iterator[tuple[MatrixRef, ...]]:
    iterator = iter(refs)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _choose_program(task: WeightTask) -> RunChunk:
    # A quantised base cannot take the buffer; the builder deletes it.
    is_donated = task.donate and task.spec.format is None
    program = compile_donated_chunk if is_donated else compile_chunk

    def run(ws: tuple[Any, ...], *rest: Any) -> tuple[InitializedMatrix, ...]:
        return program(tuple(map(jnp.asarray, ws)), *rest, spec=task.spec)

    return run


def _dispatch(
    chunk: tuple[MatrixRef, ...],
    builders: dict[str, WeightBuilder],
    size: int,
    run: RunChunk,
) -> tuple[InitializedMatrix, ...]:
    """Start a chunk on the device, and return its results, which are not awaited."""
    ws = [builders[ref.task.entry.path].take_matrix(ref) for ref in chunk]
    keys = [ref.key for ref in chunk]
    datas = [take_data(ref) for ref in chunk]
    dtype = compute_dtype(ws[0].dtype)
    scales = [np.asarray(ref.task.entry.rule.scale, dtype) for ref in chunk]

    # Fill the last chunk with zeros, so that it runs the same program.
    num_missing = size - len(chunk)
    zeros_like = np.zeros_like if isinstance(ws[0], np.ndarray) else jnp.zeros_like
    ws += [zeros_like(ws[0]) for _ in range(num_missing)]
    keys += [keys[0]] * num_missing
    datas += [datas[0]] * num_missing
    scales += [scales[0]] * num_missing

    return run(tuple(ws), tuple(scales), tuple(keys), tuple(datas))


def _collect(
    chunk: tuple[MatrixRef, ...],
    results: tuple[InitializedMatrix, ...],
    builders: dict[str, WeightBuilder],
    bar: Progress,
) -> None:
    """Wait for the results of a chunk and give them to the builders."""
    for ref, found in zip(chunk, results, strict=False):
        if not found.is_finite:
            refuse_nonfinite(ref)
        builders[ref.task.entry.path].put_matrix(ref, found)

    task = chunk[0].task
    itemsize = jnp.dtype(task.leaf.dtype).itemsize
    num_bytes = len(chunk) * math.prod(task.matrix_shape) * itemsize
    bar.advance(len(chunk), num_bytes=num_bytes)


def refuse_nonfinite(ref: MatrixRef) -> NoReturn:
    """Raise, and count the NaN and Inf if the weight was not donated."""
    path, leaf, data = ref.task.entry.path, ref.task.leaf, ref.task.data
    is_deleted = is_concrete(leaf) and leaf.is_deleted()
    if not is_deleted and hasattr(leaf, "size"):
        _checks.check_finite(leaf, path)
    if data is not None:
        _checks.check_finite(data, f"data[{path!r}]")
    raise ValueError(
        f"`{path}` must have finite factors of rank {ref.task.spec.rank}, got NaN or "
        "Inf. Look for NaN or Inf in it, and for values at the limits of its dtype."
    )
