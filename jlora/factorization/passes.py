"""The number of passes and the block size of a randomised decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jlora import _checks
from jlora.factors import SVD

# From this min(m, n) on, wide blocks and few passes cost less if the rank truncates the
# bulk of the spectrum.
_LARGE = 3072
# (largest min(m, n) / rank, num_passes)
_PASSES_OF_RATIO = ((5, 16), (8, 20), (16, 22))
_SUBSPACE_PASSES = 10
_WARM_PASSES = 2
_WARM_OVERSAMPLING = 8


class IterationSizes(NamedTuple):
    """The static sizes of one randomised decomposition."""

    num_passes: int
    block_size: int
    width: int  # rows of the widest basis


def plan_iteration(
    shape: Sequence[int],
    rank: int,
    num_passes: int | None = None,
    block_size: int | None = None,
    method: str = "krylov",
    warm_start: SVD | None = None,
) -> IterationSizes:
    """Return the sizes for a matrix of `shape`, with defaults in place of None."""
    limit = min(shape[-2:])
    is_given = num_passes is not None or block_size is not None
    default_passes, default_block = _find_defaults(limit, rank, method, warm_start)

    num_passes = default_passes if num_passes is None else num_passes
    num_passes = _checks.check_integer(num_passes, "num_passes", minimum=2)
    num_blocks = num_passes // 2 if method == "krylov" else 1

    if block_size is None:
        # Few passes build few blocks, and together these have to hold the rank.
        block_size = min(limit, max(default_block, -(-rank // num_blocks)))
    block_size = _checks.check_integer(block_size, "block_size", maximum=limit)

    width = block_size * num_blocks
    if is_given and width < rank:
        raise ValueError(
            f"`block_size` must give a basis of at least rank = {rank} columns, got "
            f"{width} (block_size {block_size}, num_passes {num_passes}, method "
            f"{method!r}). Raise one."
        )
    # Krylov keeps one more right block than left blocks.
    width += block_size if method == "krylov" else 0
    return IterationSizes(num_passes, block_size, width)


def _find_defaults(
    limit: int, rank: int, method: str, warm_start: SVD | None
) -> tuple[int, int]:
    """Return the default (num_passes, block_size)."""
    if warm_start is not None:
        return _WARM_PASSES, warm_start.s.shape[-1] + _WARM_OVERSAMPLING
    if method == "krylov":
        return plan_krylov(limit, rank)
    return _SUBSPACE_PASSES, 2 * rank


def plan_krylov(limit: int, rank: int) -> tuple[int, int]:
    """Return the default (num_passes, block_size) for matrices of limit = min(m, n).

    The fewest passes with an excess error of at most 1e-4 on the slowest of the spectra
    in benchmarks/results, "choice of passes": spiked, flat and pretrained, over several
    seeds. Ranks 9 to 16 of a large matrix get a few more passes, because subspace
    iteration is that accurate there too.
    """
    half = max(8, -(-rank // 2))
    if rank <= 8:
        return 14, half
    if rank <= 16:
        return (22 if limit < 2048 else 26), half

    if limit >= _LARGE:
        return (18, rank) if rank <= 64 else (28, half)
    # A basis that spans a large fraction of the whole space needs fewer passes.
    for ratio, num_passes in _PASSES_OF_RATIO:
        if limit <= ratio * rank:
            return num_passes, half
    return (22 if rank >= 128 else 26), half
