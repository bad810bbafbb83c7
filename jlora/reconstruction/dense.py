"""The weight rebuilt, base + scale * u @ v, and the base recovered from it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._dispatch import choose
from jlora._numerics import compute_dtype
from jlora._sharding import follow_axes
from jlora._types import Array, DTypeLike, Float, PRNGKey, Scalar
from jlora.factors import Factors
from jlora.reconstruction.arguments import (
    Base,
    Columns,
    Rounding,
    prepare_arguments,
)
from jlora.reconstruction.implementations import (
    IMPLEMENTATIONS,
    Bases,
    Result,
    SumSpec,
    add_bases,
    put_columns,
    sum_product,
)
from jlora.reconstruction.rounding import (
    round_sum,
)


def reconstruct(
    factors: Factors,
    base: Base | None = None,
    *,
    scale: Scalar = 1.0,
    columns: Columns | None = None,
    rounding: Rounding = "nearest",
    key: PRNGKey | None = None,
    dtype: DTypeLike | None = None,
    donate: bool = False,
    implementation: str | None = None,
) -> Any:
    """Return base + scale * u @ v, or scale * u @ v without a base.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: matrix [..., m, n], or a `CompensatedWeight`. None: no base.
        scale: number or scalar array, static or traced.
        columns: the columns to compute, in k·m work: an integer k (static: the last k),
            a slice, or a 1-D array of k distinct indices. The others are copied from
            `base`; without a base only the k columns are returned, [..., m, k]. None:
            all.
        rounding: static, how the sum becomes bfloat16 or float16: "nearest";
            "stochastic", one of the two neighbours at random, right on average;
            "compensated", two arrays whose sum it is. Other dtypes support "nearest"
            only.
        key: one typed PRNG key for "stochastic", consumed. None: for the others.
        dtype: static, dtype of the result. None: the dtype of `base`, or the common
            dtype of u and v.
        donate: static. Reuse the base's buffer for the result; do not use `base`
            afterwards. Inside jax.jit it only chooses an implementation: donate the
            argument of the outer jit as well.
        implementation: static, a name (see `which_implementation`). None: chosen.

    Returns:
        [..., m, n] (or [..., m, k], see `columns`), or with rounding="compensated" a
        `CompensatedWeight` of two such arrays.

    Raises:
        TypeError: arrays, indices or a key of the wrong kind, no key where one is
            needed.
        ValueError: shapes that do not fit, columns out of range or repeated, an unknown
            rounding or one that the dtype does not support.
        NotImplementedError: an implementation by name that cannot run here.

    Cost: 2 m n r flops, one pass over the weight. On a CPU a sum of rank over 8 (24 in
        16 bits) also writes and reads u @ v, unless `donate` is set. For sharded arrays
        `columns` computes all columns, because the update of a slice would gather the
        base; this is known outside of jax.jit, and on explicit axes. Inside jax.jit on
        a CPU do not set `donate` for arrays sharded by rows: the loop would gather
        them.

    Accuracy: computed in at least float32 and rounded once to the result's dtype. (On
        CUDA, for a 16-bit base, the product is rounded to its dtype first: 2⁻⁹ of it in
        bfloat16.) Relative error of the stored delta, in norm, for a bfloat16 base of
        rms 0.02:

            rms of the delta        1e-2    1e-3    1e-4    1e-5
            nearest                 0.004   0.033   0.32    0.9
            stochastic              0.005   0.047   0.46    2.5
            mean of 64 stochastic   7e-4    0.006   0.06    0.31
            compensated             6e-6    5e-5    5e-4    0.0015

    Gradients: exact, to u, v, base and scale; rounding is ignored.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]]))
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), scale=2.0).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), columns=1).tolist()
        [[0.0, 0.0, 3.0], [0.0, 0.0, 3.0]]
    """
    arguments = prepare_arguments(
        factors, base, scale, columns, rounding, key, dtype, donate, implementation
    )
    return (_reconstruct_donated if donate else _reconstruct)(*arguments)


def unmerge(
    factors: Factors,
    merged: Base,
    *,
    scale: Scalar = 1.0,
    columns: Columns | None = None,
    donate: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*batch m n"]:
    """Return merged - scale * u @ v: the base that `reconstruct` was given.

    Args:
        factors: the `Factors` that were merged.
        merged: matrix [..., m, n], or a `CompensatedWeight`.
        scale, columns, donate, implementation: the same as in `reconstruct`.

    Returns:
        Array in the dtype of `merged`; for a `CompensatedWeight` one array, in the
        dtype of its parts.

    Raises:
        TypeError, ValueError, NotImplementedError: as `reconstruct`.

    Cost: as `reconstruct`.

    Accuracy: float32 is recovered to rounding of the larger of the two. A 16-bit base
        that was merged with rounding="compensated" is recovered bit by bit wherever
        |scale * u @ v| is below 64 times |base|, and in float16 |base| is at least
        2⁻¹³; elsewhere to 2⁻¹⁶ of the delta, and in float16 to 2⁻²⁴. Merged otherwise,
        it has lost the digits that its merged value could not hold.

    Gradients: exact, to u, v, merged and scale.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((1, 1), 1e-3), jnp.ones((1, 1)))
        >>> base = jnp.full((1, 1), 0.7, jnp.bfloat16)
        >>> merged = jlora.reconstruct(factors, base, rounding="compensated")
        >>> bool((jlora.reconstruction.unmerge(factors, merged) == base).all())
        True
    """
    if merged is None:
        raise TypeError(
            "`merged` must be a matrix or a CompensatedWeight, got None. "
            "Pass the result of reconstruct."
        )
    scale = -_checks.check_scalar(scale, "scale")
    arguments = prepare_arguments(
        factors,
        merged,
        scale,
        columns,
        "nearest",
        None,
        None,
        donate,
        implementation,
        base_name="merged",
    )
    return (_reconstruct_donated if donate else _reconstruct)(*arguments)


def choose_implementation(
    platform: str,
    factors: Factors,
    base: Base | None = None,
    *,
    scale: Scalar = 1.0,
    columns: Columns | None = None,
    rounding: Rounding = "nearest",
    key: PRNGKey | None = None,
    dtype: DTypeLike | None = None,
    donate: bool = False,
    implementation: str | None = None,
) -> str:
    """Return the name of the implementation that `reconstruct` would run."""
    given = prepare_arguments(
        factors, base, scale, columns, rounding, key, dtype, donate, implementation
    )
    bases, v, spec = given.bases, given.v, given.spec
    if columns is not None:
        bases, v = _take_columns(bases, v, given.span, given.indices)
        spec = spec._replace(donate=False)
    arrays = bases, given.u, v, given.key
    return choose(IMPLEMENTATIONS, implementation, platform, arrays, spec).name


@follow_axes("*b m n", "*b m r", "*b r n", None, None, None, result="*b m n")
def _run(
    bases: Bases,
    u: Array,
    v: Array,
    scale: Scalar,
    key: PRNGKey | None,
    indices: Array | None,
    span: tuple[int, int] | None,
    spec: SumSpec,
    implementation: str | None,
) -> Result:
    compute = compute_dtype(u.dtype, v.dtype, *(base.dtype for base in bases))
    # Scale a thin factor: on the product it would cost one more pass over m×n.
    u, v = u.astype(compute) * jnp.asarray(scale, compute), v.astype(compute)
    if span is None and indices is None:
        return sum_product(bases, u, v, key, spec, implementation)

    if bases and spec.is_sharded:
        return _sum_selected(bases, u, v, key, indices, span, spec)

    # Only some columns: compute them, and copy the others from the base.
    parts, v = _take_columns(bases, v, span, indices)
    block_spec = spec._replace(donate=False)
    block = sum_product(parts, u, v, key, block_spec, implementation)
    if not bases:
        return block
    others = _round_others(bases, spec, compute)
    return jax.tree.map(
        lambda other, new: _put(other, new, span, indices), others, block
    )


def _sum_selected(
    bases: Bases,
    u: Array,
    v: Array,
    key: PRNGKey | None,
    indices: Array | None,
    span: tuple[int, int] | None,
    spec: SumSpec,
) -> Result:
    """Return the sum in some columns, by a selection from the sum in all of them.

    The update of a slice would gather a sharded base.
    """
    columns = jnp.arange(v.shape[-1])
    if span is not None:
        is_computed = (columns >= span[0]) & (columns < span[1])
    else:
        assert indices is not None
        is_computed = jnp.any(columns[:, None] == indices[None], axis=1)

    total = sum_product(bases, u, v, key, spec._replace(donate=False), "plain")
    others = _round_others(bases, spec, u.dtype)
    return jax.tree.map(
        lambda other, new: jnp.where(is_computed, new, other), others, total
    )


def _take_columns(
    bases: Bases, v: Array, span: tuple[int, int] | None, indices: Array | None
) -> tuple[Bases, Array]:
    index = indices if span is None else slice(*span)
    return tuple(base[..., index] for base in bases), v[..., index]


def _round_others(bases: Bases, spec: SumSpec, compute: Any) -> Result:
    """Return the bases in the format of the result, for the columns that stay.

    They are never rounded stochastically.
    """
    if spec.rounding != "compensated" and len(bases) == 1:
        return bases[0].astype(spec.dtype)
    rounding = "compensated" if spec.rounding == "compensated" else "nearest"
    return round_sum(add_bases(bases, compute), spec.dtype, rounding, None)


def _put(
    array: Array, block: Array, span: tuple[int, int] | None, indices: Array | None
) -> Array:
    if span is None:
        return array.at[..., indices].set(block)
    return put_columns(array, block, span[0])


_STATIC = ("span", "spec", "implementation")
_reconstruct = jax.jit(_run, static_argnames=_STATIC)
_reconstruct_donated = jax.jit(_run, static_argnames=_STATIC, donate_argnames="bases")
