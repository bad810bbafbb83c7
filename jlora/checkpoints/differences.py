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
from jlora.checkpoints.architectures import Slice
from jlora.checkpoints.checkpoint import Checkpoint
from jlora.checkpoints.factor_store import Part, put_parts
from jlora.checkpoints.memory import check_fits, find_work_bytes
from jlora.checkpoints.modules import MatrixRef, StoredModule, read_rows
from jlora.checkpoints.window_store import WindowStore
from jlora.factorization.svd import randomized_svd
from jlora.factors import SVD, Factors, split_svd
from jlora.reconstruction.dense import reconstruct

# Enough to keep more energy than torch.svd_lowrank with niter=4.
_NUM_PASSES = 10
_BLOCK = 2**22  # elements that are subtracted at once
# The part of the energy above which a difference of float32 numbers, of about 1e-6,
# gives the rest to four digits.
_SMALL = 0.01


class Operands(NamedTuple):
    """The checkpoints whose difference is decomposed."""

    new: Checkpoint
    old: Checkpoint | None  # None: nothing is subtracted


def count_work_bytes(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes that one matrix takes while it is decomposed."""
    m, n = shape
    # The difference, its scaled copy, blocks of rows, and panels of the factorisation:
    # the last term was measured, 30 bytes for each number of the factors.
    return 8 * m * n + 12 * _BLOCK + 32 * min(rank, m, n) * (m + n)


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
    for number, window in store.list_missing(bar):
        parts = {}
        for ref, part in _decompose_window(window, operands, rank, key, max_memory):
            parts[ref.name] = part
            bar.count(1, 4 * ref.module.num_elements)
        put_parts(store, number, parts)


def read_wide(checkpoint: Checkpoint, name: str) -> Array:
    """Return a tensor [m, n] of a checkpoint in float32, without a second copy."""
    m, n = checkpoint.info(name).shape
    module = StoredModule(name, (Slice(name),), (m, n), None, "io", "float32")
    buffer = jnp.zeros((1, m, n), jnp.float32)
    return _subtract(buffer, [MatrixRef(module, 0)], Operands(checkpoint, None))[0]


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
        # One buffer for all chunks of a group: to fill a new one takes as long as to
        # subtract. The last chunk may leave older matrices in it, which run along.
        delta = jnp.zeros((size, *_get_stored_shape(first.module)), jnp.float32)
        for chunk in _split(refs, size):
            delta = _subtract(delta, chunk, operands)
            parts = _decompose(delta, chunk, operands, rank, key)
            yield from zip(chunk, parts, strict=True)


def _split(refs: list[MatrixRef], size: int) -> Iterator[list[MatrixRef]]:
    iterator = iter(refs)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _get_stored_shape(module: StoredModule) -> tuple[int, int]:
    num_inputs, num_outputs = module.shape
    is_io = module.layout == "io"
    return (num_inputs, num_outputs) if is_io else (num_outputs, num_inputs)


def _choose_step(num_rows: int, num_columns: int) -> int:
    """Return how many rows are worked on at once."""
    return min(num_rows, max(1, _BLOCK // num_columns))


def _subtract(delta: Array, chunk: list[MatrixRef], operands: Operands) -> Array:
    """Return the buffer [k, m, n] with the differences of a chunk."""
    num_rows = delta.shape[1]
    step = _choose_step(*delta.shape[1:])
    for index, ref in enumerate(chunk):
        for start in range(0, num_rows, step):
            # The last block overlaps the one before: all have one shape.
            start = min(start, num_rows - step)
            blocks = tuple(
                jnp.asarray(read_rows(each, ref, start, start + step))
                for each in operands
                if each is not None
            )
            delta = _subtract_rows(delta, blocks, index, start)
    return delta


def _decompose(
    delta: Array,
    chunk: list[MatrixRef],
    operands: Operands,
    rank: int,
    key: PRNGKey,
) -> list[Part]:
    """Return the parts of matrices of one shape, computed as one batch."""
    size, *shape = delta.shape
    keys = [fold_path(key, ref.name) for ref in chunk]
    keys += [keys[0]] * (size - len(chunk))
    found = jax.device_get(_decompose_batch(delta, jnp.stack(keys), min(rank, *shape)))
    parts = []
    for index, ref in enumerate(chunk):
        svd, rest, is_finite = jax.tree.map(lambda array, i=index: array[i], found)
        if not is_finite:
            raise ValueError(
                f"{operands.new.path}: must be finite, got NaN or Inf in the change of "
                f"{ref.name}. Train it again."
            )
        # From inputs to outputs: the factors of the transpose are these, exchanged.
        if ref.module.layout == "oi":
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


@functools.partial(jax.jit, static_argnames="rank")
def _decompose_batch(
    delta: Float[Array, "k m n"], keys: Array, rank: int
) -> tuple[SVD, Float[Array, " k"], Array]:
    """Return the leading triplets of each matrix, the norm of the rest, "finite"."""
    run = functools.partial(_decompose_matrix, rank=rank)
    if len(delta) == 1:
        return jax.tree.map(lambda array: array[None], run(delta[0], keys[0]))
    return jax.vmap(run)(delta, keys)


def _decompose_matrix(
    delta: Float[Array, "m n"], key: PRNGKey, *, rank: int
) -> tuple[SVD, Array, Array]:
    svd = randomized_svd(delta, rank, key=key, num_passes=_NUM_PASSES)
    # First along the rows: a sum over millions of squares in float32 loses digits.
    total = frobenius_norm(jax.vmap(frobenius_norm)(delta[:, None])[None])
    parts = svd.s / jnp.where(total > 0, total, 1)
    part_left = 1 - jnp.sum(parts**2)

    # The difference of two numbers near 1 has few digits if little is left.
    rest = jax.lax.cond(
        part_left > _SMALL,
        lambda: total * jnp.sqrt(jnp.maximum(part_left, 0)),
        lambda: _measure_rest(delta, svd),
    )
    is_finite = jnp.isfinite(total) & jnp.isfinite(svd.s).all()
    return svd, rest, is_finite


def _measure_rest(delta: Float[Array, "m n"], svd: SVD) -> Float[Array, ""]:
    """Return the norm of delta - u diag(s) vt, block by block.

    A whole residual would take as much memory as the matrix.
    """
    u, v = split_svd(svd, "right")
    num_rows = len(delta)
    step = _choose_step(*delta.shape)

    def measure_block(start: Array) -> Array:
        first = jnp.minimum(start, num_rows - step)
        rows = jax.lax.dynamic_slice_in_dim(delta, first, step)
        own_u = jax.lax.dynamic_slice_in_dim(u, first, step)
        residual = reconstruct(Factors(own_u, v), rows, scale=-1.0)
        is_new = first + jnp.arange(step) >= start
        return frobenius_norm(jnp.where(is_new[:, None], residual, 0))

    norms = jax.lax.map(measure_block, jnp.arange(0, num_rows, step))
    return frobenius_norm(norms[None])
