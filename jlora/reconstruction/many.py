"""Rows of one batch through different adapters: x base + scale * (x u[index]) v[index]."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._dispatch import Implementation, can_always, check_usable, choose, run_first
from jlora._numerics import compute_dtype, matmul_activations, to_compute
from jlora.factors import Factors, pad_rank
from jlora.reconstruction.apply import choose_dtypes

_LEAST_BLOCK_ROWS, _MOST_BLOCK_ROWS = 16, 64


def stack_factors(factors):
    """Return a bank of adapters for `apply_many`: factors stacked, ranks made equal by zeros.

    Shapes: m, n rows and columns of every product, rᵢ their ranks, r the largest of these, a how
    many there are.

    Args:
        factors: a sequence of `Factors` of u [m, rᵢ], v [rᵢ, n].

    Returns:
        `Factors` of u [a, m, r], v [a, r, n] in the common compute dtype; adapter i is entry i.

    Raises:
        TypeError: an entry that is no pair of factors.
        ValueError: no entry at all, or sizes that differ.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> one, two = (jlora.Factors(jnp.ones((3, r)), jnp.ones((r, 2))) for r in (1, 4))
        >>> jlora.stack_factors([one, two]).u.shape
        (2, 3, 4)
    """
    pairs = _checks.check_pairs(factors)
    rank = max(u.shape[-1] for u, _ in pairs)
    parts = to_compute(*(part for pair in pairs for part in pair))
    padded = [
        pad_rank(Factors(*pair), rank)
        for pair in zip(parts[::2], parts[1::2], strict=True)
    ]
    return jax.tree.map(lambda *each: jnp.stack(each), *padded)


def apply_many(x, bank, index, base=None, *, scale=1.0, implementation=None):
    """Return x @ base + scale * (x @ u[index]) @ v[index], an adapter of its own for each row.

    For few rows the adapters of each are gathered; many rows are sorted by adapter into blocks
    that share one. Nothing is expanded over all adapters.

    Shapes: t rows, m inputs, n outputs, a adapters, r rank.

    Args:
        x: [..., t, m] real floating.
        bank: `Factors` of u [a, m, r], v [a, r, n]; see `stack_factors` for mixed ranks.
        index: [..., t] integers, the adapter of each row; -1 for none. Traced ones are not
            checked: what is out of range counts as -1.
        base: [m, n] real floating. None: no base.
        scale: number, or [a] one for each adapter, static or traced.
        implementation: static, "gather" or "sort". None: chosen.

    Returns:
        [..., t, n] in the dtype that `apply_factors` gives.

    Raises:
        TypeError: arrays of the wrong kind.
        ValueError: shapes that do not fit, or an index outside [-1, a).

    Cost: that of x @ base and 2 t r (m + n) flops; gathering copies r (m + n) numbers for each
        row, sorting for each block of b rows, of which there are t / b + a, b = 16 to 64.

    Accuracy, Gradients: those of `apply_factors`; exact, to x, u, v, base and scale.

    Source: Chen et al., "Punica: multi-tenant LoRA serving", 2023, and Sheng et al., "S-LoRA",
        2023, for the problem and its two regimes.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> bank = jlora.Factors(jnp.ones((2, 3, 1)), jnp.array([[[1.0, 1.0]], [[5.0, 5.0]]]))
        >>> jlora.apply_many(jnp.ones((3, 3)), bank, jnp.array([1, -1, 0])).tolist()
        [[15.0, 15.0], [0.0, 0.0], [3.0, 3.0]]
    """
    arguments = _prepare(x, bank, index, base, scale, implementation)
    return _apply_many(*arguments, implementation)


def choose_many(platform, x, bank, index, base=None, *, scale=1.0, implementation=None):
    """Return the name of the form that `apply_many` would take on a platform."""
    x, u, v, index, _, scale = _prepare(x, bank, index, base, scale, implementation)
    arrays = x.reshape(-1, x.shape[-1]), u, v, scale, index.reshape(-1)
    return choose(_IMPLEMENTATIONS, implementation, platform, arrays).name


def _prepare(x, bank, index, base, scale, implementation):
    x = _checks.check_matrix(x, "x")
    u, v = _checks.check_factors(bank, "bank")
    if u.ndim != 3:
        raise ValueError(
            f"`bank` must have u [a, m, r] and v [a, r, n], got {u.shape} and {v.shape}. "
            "Make one with jlora.stack_factors."
        )
    _checks.check_shape(
        x.shape[-1:], (u.shape[-2],), "x", "its columns are the rows of bank.u"
    )
    if base is not None:
        base = _checks.check_base(base, (u.shape[-2], v.shape[-1]))
    index = _check_index(index, x.shape[:-1], len(u))
    scale = jnp.asarray(scale)
    if scale.shape not in ((), (len(u),)):
        raise ValueError(
            f"`scale` must be a number or have shape ({len(u)},), one for each adapter, got shape "
            f"{scale.shape}. Reshape it."
        )
    arrays = x.reshape(-1, x.shape[-1]), u, v, scale, index.reshape(-1)
    check_usable(_IMPLEMENTATIONS, implementation, arrays)
    return x, u, v, index, base, scale


def _check_index(index, shape, num_adapters):
    if not (hasattr(index, "shape") and jnp.issubdtype(index.dtype, jnp.integer)):
        kind = getattr(index, "dtype", type(index).__name__)
        raise TypeError(
            f"`index` must be an array of integers, got {kind}. Wrap it with jnp.asarray."
        )
    _checks.check_shape(index.shape, shape, "index", "one for each row of x")
    if not isinstance(index, jax.core.Tracer):
        outside = np.asarray(index)[
            (np.asarray(index) < -1) | (np.asarray(index) >= num_adapters)
        ]
        if outside.size:
            raise ValueError(
                f"`index` must lie in [-1, {num_adapters}), got {outside[0]}. "
                "Count the adapters of the bank."
            )
    return jnp.asarray(index)


@jax.jit(static_argnames="implementation")
def _apply_many(x, u, v, index, base, scale, implementation):
    *batch, m = x.shape
    working, dtype = choose_dtypes(x, u, v, base)
    rows, index = x.reshape(-1, m).astype(working), index.reshape(-1).astype(jnp.int32)
    scale = jnp.broadcast_to(scale, len(u)).astype(compute_dtype(working))
    arrays = rows, u.astype(working), v.astype(working), scale, index
    delta = run_first(_IMPLEMENTATIONS, implementation, arrays)
    if base is not None:
        delta = delta + matmul_activations(rows, base.astype(working))
    return delta.astype(dtype).reshape(*batch, v.shape[-1])


def _is_gain_gather(platform, rows, u, v, scale, index):
    # The sorted form copies an adapter for each block instead of each row, and sorts.
    return len(rows) <= 2 * _count_blocks(len(rows), len(u))


def _apply_gathered(rows, u, v, scale, index):
    """Return each row times the adapter that is gathered for it."""
    is_used = (index >= 0) & (index < len(u))
    safe = jnp.where(is_used, index, 0)
    thin = matmul_activations(rows[:, None, :], u[safe])
    thin = (thin * scale[safe, None, None]).astype(rows.dtype)
    delta = matmul_activations(thin, v[safe])[:, 0]
    return jnp.where(is_used[:, None], delta, 0)


def _apply_sorted(rows, u, v, scale, index):
    """Return the same with the rows of each adapter side by side, in blocks of one adapter each.

    Each adapter's rows start a new block; how many blocks there can be is known beforehand.
    """
    num_rows, num_adapters = len(rows), len(u)
    block_rows = _choose_block_rows(num_rows, num_adapters)
    num_blocks = _count_blocks(num_rows, num_adapters)
    is_used = (index >= 0) & (index < num_adapters)
    group = jnp.where(is_used, index, num_adapters)  # rows without an adapter come last
    counts = jnp.bincount(group, length=num_adapters + 1)
    blocks = -(-counts // block_rows)
    last_block = jnp.cumsum(blocks)
    order = jnp.argsort(group)
    sorted_group = group[order]
    place = jnp.arange(num_rows) - (jnp.cumsum(counts) - counts)[sorted_group]
    slot = (last_block - blocks)[sorted_group] * block_rows + place
    # Only rows without an adapter may get a slot beyond the end: dropped here, zero in the result.
    num_slots = num_blocks * block_rows
    source = jnp.full(num_slots, num_rows).at[slot].set(order, mode="drop")
    padded = rows.at[source].get(mode="fill", fill_value=0)
    adapter = jnp.searchsorted(last_block[:-1], jnp.arange(num_blocks), side="right")
    adapter = jnp.minimum(adapter, num_adapters - 1)
    stacked = padded.reshape(num_blocks, block_rows, -1)
    thin = matmul_activations(stacked, u[adapter])
    thin = (thin * scale[adapter, None, None]).astype(rows.dtype)
    delta = matmul_activations(thin, v[adapter]).reshape(num_slots, -1)
    slot_of_row = jnp.zeros_like(slot).at[order].set(slot)
    delta = delta.at[slot_of_row].get(mode="fill", fill_value=0)
    return jnp.where(is_used[:, None], delta, 0)


def _choose_block_rows(num_rows, num_adapters):
    """Return the power of two nearest above the rows that an adapter has on average."""
    average = -(-num_rows // num_adapters)
    return min(
        max(1 << (average - 1).bit_length(), _LEAST_BLOCK_ROWS), _MOST_BLOCK_ROWS
    )


def _count_blocks(num_rows, num_adapters):
    """Return how many blocks there can be: full ones, and one for each adapter that is not."""
    whole = -(-num_rows // _choose_block_rows(num_rows, num_adapters))
    return whole + min(num_adapters, num_rows)


_IMPLEMENTATIONS = (
    Implementation("gather", can_always, _is_gain_gather, _apply_gathered),
    Implementation(
        "sort", can_always, lambda platform, *arguments: True, _apply_sorted
    ),
)
