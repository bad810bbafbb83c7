"""The leading singular triplets of the differences of two checkpoints."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora._numerics import frobenius_norm
from jlora._progress import Progress
from jlora._types import Array, Float, PRNGKey
from jlora.adaptation.chunks import fit_chunk_size
from jlora.adaptation.paths import fold_path
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.factor_store import Part, put_parts
from jlora.checkpoints.memory import check_fits, find_work_bytes
from jlora.checkpoints.modules import MatrixRef, StoredModule, read_rows
from jlora.checkpoints.window_store import WindowStore
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors, split_svd
from jlora.reconstruction.dense import reconstruct

# Enough to keep more energy than torch.svd_lowrank with niter=4, in half of its time.
_NUM_PASSES = 10
_BLOCK = 2**22  # elements that are subtracted at once


class Operands(NamedTuple):
    """The checkpoints whose difference is decomposed."""

    new: Checkpoint
    old: Checkpoint | None  # None: nothing is subtracted


def count_work_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes that one matrix takes while it is decomposed."""
    m, n = shape
    # The difference, its scaled copy, blocks of rows, and panels of the factorisation.
    return 8 * m * n + 32 * _BLOCK + 24 * min(2 * rank, m, n) * (m + n)


def fill_store(
    store: WindowStore,
    operands: Operands,
    rank: int,
    key: PRNGKey,
    max_memory: int | None,
    bar: Progress,
) -> None:
    """Decompose the matrices of a store that it does not hold yet.

    Args:
        store: of the job.
        operands: the two checkpoints.
        rank: number of triplets, at most.
        key: folded with the name of each matrix.
        max_memory: of the job in bytes.
        bar: shows the matrices.

    Raises:
        ValueError: NaN or Inf in a matrix.
    """
    for number, window, is_done in store.list_windows():
        if is_done:
            bar.count(len(window))
            continue
        parts = {}
        for ref, part in _decompose_window(window, operands, rank, key, max_memory):
            parts[ref.name] = part
            bar.count(1, 4 * ref.module.num_elements)
        put_parts(store, number, parts)


def check_window_memory(
    modules: Iterable[StoredModule], rank: int, max_memory: int | None
) -> None:
    """Refuse the first module whose matrices do not fit in the memory of a job."""
    for module in modules:
        needed = count_work_bytes(module.shape, rank)
        check_fits(max_memory, needed, module.path)


def _decompose_window(
    window: list[MatrixRef],
    operands: Operands,
    rank: int,
    key: PRNGKey,
    max_memory: int | None,
) -> Iterator[tuple[MatrixRef, Part]]:
    """Yield the leading triplets of each matrix: the first one minus the second.

    Matrices of one shape share a compiled program, which runs in chunks.
    """
    groups: dict[tuple, list[MatrixRef]] = {}
    for ref in window:
        groups.setdefault((ref.module.shape, ref.module.layout), []).append(ref)

    for refs in groups.values():
        first = refs[0]
        needed = count_work_bytes(first.module.shape, rank)
        limit = find_work_bytes(max_memory)
        size = fit_chunk_size(first.module.num_elements, needed, limit)
        for chunk in _split(refs, size):
            yield from zip(
                chunk, _decompose(chunk, size, operands, rank, key), strict=True
            )


def _split(refs: list[MatrixRef], size: int) -> Iterator[list[MatrixRef]]:
    iterator = iter(refs)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _decompose(
    chunk: list[MatrixRef],
    size: int,
    operands: Operands,
    rank: int,
    key: PRNGKey,
) -> list[Part]:
    """Return the parts of matrices of one shape, computed as one batch."""
    first = chunk[0].module
    shape = first.shape if first.layout == "io" else first.shape[::-1]
    # Fill the last chunk with zeros, so that it runs the same program.
    delta = jnp.zeros((size, *shape), jnp.float32)
    step = min(shape[0], max(1, _BLOCK // shape[1]))
    for index, ref in enumerate(chunk):
        for start in range(0, shape[0], step):
            # The last block overlaps the one before: all have one shape.
            start = min(start, shape[0] - step)
            blocks = tuple(
                jnp.asarray(read_rows(each, ref, start, start + step))
                for each in operands
                if each is not None
            )
            delta = _subtract_rows(delta, blocks, index, start)

    keys = [fold_path(key, ref.name) for ref in chunk]
    keys += [keys[0]] * (size - len(chunk))
    found = jax.device_get(
        _decompose_batch(delta, jnp.stack(keys), min(rank, *shape), step)
    )
    parts = []
    for index, ref in enumerate(chunk):
        svd, rest, is_finite = jax.tree.map(lambda array, i=index: array[i], found)
        if not is_finite:
            raise ValueError(
                f"{operands.new.path}: must be finite, got NaN or Inf in the change of "
                f"{ref.name}. Train it again."
            )
        # From inputs to outputs: the factors of the transpose are these, exchanged.
        if first.layout == "oi":
            svd = SVD(svd.vt.T, svd.s, svd.u.T)
        parts.append(Part(svd, float(rest)))
    return parts


@functools.partial(jax.jit, donate_argnames="delta")
def _subtract_rows(
    delta: Array, blocks: tuple[Array, ...], index: Array, start: Array
) -> Array:
    """Write rows of one difference into the batch."""
    wide = [block.astype(jnp.float32) for block in blocks]
    rows = wide[0] - wide[1] if len(wide) == 2 else wide[0]
    return jax.lax.dynamic_update_slice(delta, rows[None], (index, start, 0))


@functools.partial(jax.jit, static_argnames=("rank", "step"))
def _decompose_batch(
    delta: Float[Array, "k m n"], keys: PRNGKey, rank: int, step: int
) -> tuple[SVD, Float[Array, " k"], Array]:
    """Return the leading triplets of each matrix, the norm of the rest, "finite"."""
    run = functools.partial(_decompose_matrix, rank=rank, step=step)
    if len(delta) == 1:
        return jax.tree.map(lambda array: array[None], run(delta[0], keys[0]))
    return jax.vmap(run)(delta, keys)


def _decompose_matrix(
    delta: Float[Array, "m n"], key: PRNGKey, *, rank: int, step: int
) -> tuple[SVD, Array, Array]:
    svd = randomized_svd(delta, rank, key=key, num_passes=_NUM_PASSES)
    u, v = split_svd(svd, "right")
    num_rows = len(delta)

    def measure_block(start: Array) -> tuple[Array, Array]:
        """Return the norm of some rows of the residual, and whether all are finite."""
        first = jnp.minimum(start, num_rows - step)
        rows = jax.lax.dynamic_slice_in_dim(delta, first, step)
        own_u = jax.lax.dynamic_slice_in_dim(u, first, step)
        residual = reconstruct(Factors(own_u, v), rows, scale=-1.0)
        is_new = first + jnp.arange(step) >= start
        norm = frobenius_norm(jnp.where(is_new[:, None], residual, 0))
        return norm, jnp.isfinite(rows).all()

    # In blocks: a whole residual would take as much memory as the matrix.
    norms, are_finite = jax.lax.map(measure_block, jnp.arange(0, num_rows, step))
    return svd, frobenius_norm(norms[None]), are_finite.all()
