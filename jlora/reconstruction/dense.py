"""The weight put together again, base + scale * u @ v, and taken apart."""

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._dispatch import check_usable, choose
from jlora._numerics import common_dtype, compute_dtype
from jlora.reconstruction.implementations import (
    IMPLEMENTATIONS,
    Spec,
    add_bases,
    is_spread,
    put_columns,
    sum_product,
)
from jlora.reconstruction.rounding import CompensatedWeight, check_rounding, round_sum


def reconstruct(
    factors,
    base=None,
    *,
    scale=1.0,
    columns=None,
    rounding="nearest",
    key=None,
    dtype=None,
    donate=False,
    implementation=None,
):
    """Return base + scale * u @ v, or scale * u @ v without a base.

    Shapes: m, n rows and columns, r rank, k columns recomputed.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        base: [..., m, n] real floating, or a `CompensatedWeight` of two such. None: no base.
        scale: number or scalar array, static or traced.
        columns: which columns to compute: an integer k (static: the last k), a slice, or a 1-D
            array of k distinct indices; k·m work. The others are those of `base`; without a
            base the k columns come back alone, [..., m, k]. None: all of them.
        rounding: static, how the sum becomes bfloat16 or float16: "nearest"; "stochastic", one
            of the two neighbours at random, right on average; "compensated", two arrays whose
            sum it is. Other dtypes know "nearest" alone.
        key: one typed PRNG key for "stochastic", consumed. None: for the others.
        dtype: static, dtype of the result. None: that of `base`, or the common one of u and v.
        donate: static; the base's memory may become the result's, and `base` is gone. Inside
            jax.jit it only chooses a form: donate the argument of the outer jit as well.
        implementation: static, the name of a form (see `which_implementation`). None: chosen.

    Returns:
        [..., m, n] (or [..., m, k], see `columns`), or with rounding="compensated" a
        `CompensatedWeight` of two such.

    Raises:
        TypeError: arrays, indices or a key of the wrong kind, no key where one is needed.
        ValueError: shapes that do not fit, columns out of range or named twice, a rounding that
            is none or that the dtype has no use for.
        NotImplementedError: an implementation by name that cannot run here.

    Cost: 2 m n r flops, one pass over the weight. On a CPU a sum of rank over 8 (24 in 16 bits)
        also writes and reads u @ v, unless `donate` is set. Inside jax.jit on a CPU leave
        `donate` out for arrays sharded by rows: the loop that it chooses would gather them.

    Accuracy: computed in at least float32 and rounded once to the result's dtype. (On CUDA, for a
        base of 16 bits, the product is rounded to its dtype first: 2⁻⁹ of it in bfloat16.) What
        is lost of the delta, relative to it in norm, for a bfloat16 base of rms 0.02:

            rms of the delta        1e-2    1e-3    1e-4    1e-5
            nearest                 0.004   0.033   0.32    0.9
            stochastic              0.005   0.047   0.46    2.5
            stochastic, 64 keys     7e-4    0.006   0.06    0.31   (the mean of as many results)
            compensated             6e-6    5e-5    5e-4    0.0015

    Gradients: exact, to u, v, base and scale; those of a rounded sum are those of the sum.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]]))
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), scale=2.0).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
        >>> jlora.reconstruct(factors, jnp.zeros((2, 3)), columns=1).tolist()
        [[0.0, 0.0, 3.0], [0.0, 0.0, 3.0]]
    """
    arguments = _prepare(
        factors, base, scale, columns, rounding, key, dtype, donate, implementation
    )
    return (_reconstruct_donated if donate else _reconstruct)(*arguments)


def unmerge(
    factors, merged, *, scale=1.0, columns=None, donate=False, implementation=None
):
    """Return merged - scale * u @ v: the base that `reconstruct` was given.

    Shapes: m, n rows and columns, r rank.

    Args:
        factors: the `Factors` that were merged.
        merged: [..., m, n] real floating, or a `CompensatedWeight`.
        scale, columns, donate, implementation: as they were in `reconstruct`.

    Returns:
        [..., m, n] in the dtype of `merged`; of a `CompensatedWeight` one array, in that of its
        parts.

    Raises:
        as `reconstruct`.

    Cost: that of `reconstruct`.

    Accuracy: float32 comes back to rounding of the larger of the two. A base of 16 bits that was
        merged with rounding="compensated" comes back bit by bit wherever |scale * u @ v| is
        below 64 times |base|; elsewhere to 2⁻¹⁶ of the delta. Merged otherwise, it has lost what
        its merged value could not hold.

    Gradients: exact, to u, v, merged and scale.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((1, 1), 1e-3), jnp.ones((1, 1)))
        >>> base = jnp.full((1, 1), 0.7, jnp.bfloat16)
        >>> merged = jlora.reconstruct(factors, base, rounding="compensated")
        >>> bool((jlora.reconstruction.unmerge(factors, merged) == base).all())
        True
    """
    return reconstruct(
        factors,
        merged,
        scale=-scale,
        columns=columns,
        donate=donate,
        implementation=implementation,
    )


def choose_implementation(
    platform,
    factors,
    base=None,
    *,
    scale=1.0,
    columns=None,
    rounding="nearest",
    key=None,
    dtype=None,
    donate=False,
    implementation=None,
):
    """Return the name of the form that `reconstruct` would take on a platform."""
    bases, u, v, _, key, indices, span, spec, _ = _prepare(
        factors, base, scale, columns, rounding, key, dtype, donate, implementation
    )
    if columns is not None:
        bases, v = _take_columns(bases, v, span, indices)
        spec = spec._replace(donate=False)
    return choose(
        IMPLEMENTATIONS, implementation, platform, (bases, u, v, key), spec
    ).name


def _prepare(
    factors, base, scale, columns, rounding, key, dtype, donate, implementation
):
    """Return the arguments of `_run`, checked."""
    u, v = _checks.check_factors(factors)
    bases = _check_bases(base, (*u.shape[:-1], v.shape[-1]))
    if dtype is None:
        dtype = bases[0].dtype if bases else common_dtype(u.dtype, v.dtype)
    dtype = jnp.dtype(dtype)
    check_rounding(rounding, key, dtype)
    indices, span = _read_columns(columns, v.shape[-1])
    # The loop over blocks that a donated base allows would gather one that is spread.
    spec = Spec(dtype, rounding, bool(donate) and not any(map(is_spread, bases)))
    if donate:
        _check_donation(bases, spec)
    check_usable(IMPLEMENTATIONS, implementation, (bases, u, v, key), spec)
    return bases, u, v, scale, key, indices, span, spec, implementation


def _check_donation(bases, spec):
    results = 2 if spec.rounding == "compensated" else 1
    if not 1 <= len(bases) <= results or bases[0].dtype != spec.dtype:
        given = ", ".join(str(base.dtype) for base in bases) or "none"
        raise ValueError(
            f"`donate` must come with a base that the result, {spec.dtype}, fits into, got "
            f"{given}. Leave it out."
        )


def _check_bases(base, shape):
    if base is None:
        return ()
    if not isinstance(base, CompensatedWeight):
        return (_checks.check_base(base, shape),)
    high, low = (
        _checks.check_base(part, shape, f"base.{name}")
        for name, part in zip(base._fields, base, strict=True)
    )
    return high, low


def _read_columns(columns, n):
    """Return (indices, span): any indices, or the (start, stop) of neighbours, which is static."""
    if columns is None:
        return None, None
    indices = _checks.check_columns(columns, n)
    if isinstance(indices, np.ndarray) and np.all(np.diff(indices) == 1):
        return None, (int(indices[0]), int(indices[-1]) + 1)
    return jnp.asarray(indices), None


def _run(bases, u, v, scale, key, indices, span, spec, implementation):
    compute = compute_dtype(u.dtype, v.dtype, *(base.dtype for base in bases))
    # The scale goes on a thin factor: on the product it costs one more pass over m×n.
    u, v = u.astype(compute) * jnp.asarray(scale, compute), v.astype(compute)
    if span is None and indices is None:
        return sum_product(bases, u, v, key, spec, implementation)
    parts, v = _take_columns(bases, v, span, indices)
    block = sum_product(parts, u, v, key, spec._replace(donate=False), implementation)
    if not bases:
        return block
    others = _round_others(bases, spec, compute)
    return jax.tree.map(
        lambda other, new: _put(other, new, span, indices), others, block
    )


def _take_columns(bases, v, span, indices):
    at = indices if span is None else slice(*span)
    return tuple(base[..., at] for base in bases), v[..., at]


def _round_others(bases, spec, compute):
    """Return the bases as what the columns that stay are: no randomness is spent on them."""
    if spec.rounding != "compensated" and len(bases) == 1:
        return bases[0].astype(spec.dtype)
    rounding = "compensated" if spec.rounding == "compensated" else "nearest"
    return round_sum(add_bases(bases, compute), spec.dtype, rounding, None)


def _put(array, block, span, indices):
    if span is None:
        return array.at[..., indices].set(block)
    return put_columns(array, block, span[0])


_STATIC = ("span", "spec", "implementation")
_reconstruct = jax.jit(_run, static_argnames=_STATIC)
_reconstruct_donated = jax.jit(_run, static_argnames=_STATIC, donate_argnames="bases")
