"""How many passes, and how wide a block, a randomised decomposition takes."""

from jlora import _checks

# Where the bulk of a matrix this large is cut, wide blocks and few passes cost less.
_LARGE = 3072
_PASSES_OF_RATIO = (
    (5, 16),
    (8, 20),
    (16, 22),
)  # min(m, n) over the rank, at most; passes
_SUBSPACE_PASSES = 10
_WARM_PASSES = 2
_WARM_OVERSAMPLING = 8


def plan_iteration(
    shape, rank, num_passes=None, block_size=None, method="krylov", warm_start=None
):
    """Return (num_passes, block_size, rows that the widest basis has), defaults filled in."""
    limit = min(shape[-2:])
    if warm_start is not None:
        default_passes, default_block = (
            _WARM_PASSES,
            warm_start.s.shape[-1] + _WARM_OVERSAMPLING,
        )
    elif method == "krylov":
        default_passes, default_block = plan_krylov(limit, rank)
    else:
        default_passes, default_block = _SUBSPACE_PASSES, 2 * rank
    given = num_passes is not None or block_size is not None
    num_passes = default_passes if num_passes is None else num_passes
    num_passes = _checks.check_integer(num_passes, "num_passes", minimum=2)
    num_blocks = num_passes // 2 if method == "krylov" else 1
    if block_size is None:
        # Few passes build few blocks: each has to be wider for the basis to hold the rank.
        block_size = min(limit, max(default_block, -(-rank // num_blocks)))
    block_size = _checks.check_integer(block_size, "block_size", maximum=limit)
    width = block_size * num_blocks
    if given and width < rank:
        raise ValueError(
            f"`block_size` must give a basis of at least rank = {rank} columns, got {width} "
            f"(block_size {block_size}, num_passes {num_passes}, method {method!r}). Raise one."
        )
    # Krylov keeps one right block more than left ones.
    return num_passes, block_size, width + (block_size if method == "krylov" else 0)


def plan_krylov(limit, rank):
    """Return the default (num_passes, block_size) for matrices of limit = min(m, n).

    The fewest passes that leave an excess error of at most 1e-4 on the slowest of the spectra in
    benchmarks/results, "choice of passes": spiked, flat and pretrained, over several seeds. At
    rank 16 of a large matrix a few more, since there subspace iteration comes as near too.
    """
    half = max(8, -(-rank // 2))
    if rank <= 16:
        return (14 if rank <= 8 else 22 if limit < 2048 else 26), half
    if limit < _LARGE:
        # A basis that holds a good part of the whole space needs fewer.
        for ratio, num_passes in _PASSES_OF_RATIO:
            if limit <= ratio * rank:
                return num_passes, half
        return (22 if rank >= 128 else 26), half
    return (18, rank) if rank <= 64 else (28, half)
