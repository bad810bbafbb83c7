"""Sums in float32 stored in 16 bits: to the nearest, at random without bias, or in two parts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks

ROUNDINGS = ("nearest", "stochastic", "compensated")


class CompensatedWeight(NamedTuple):
    """A weight as the sum of two arrays of one dtype: what the first cannot hold is in the second.

    Two of bfloat16 hold 16 bits, two of float16 22.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((1, 1), 1e-3), jnp.ones((1, 1)))
        >>> base = jnp.ones((1, 1), jnp.bfloat16)
        >>> merged = jlora.reconstruct(factors, base, rounding="compensated")
        >>> float(merged.high[0, 0]), round(float(merged.low[0, 0]), 5)
        (1.0, 0.001)
    """

    high: jax.Array  # [..., m, n], the sum to the nearest
    low: jax.Array  # [..., m, n], what is left of it, to the nearest


def check_rounding(rounding, key, dtype):
    """Refuse a rounding that is none, or that its key or the dtype does not fit."""
    _checks.check_choice(rounding, ROUNDINGS, "rounding")
    if rounding == "stochastic":
        if key is None:
            raise TypeError(
                "`key` must be given for rounding='stochastic', got None. "
                "Make one with jax.random.key(seed)."
            )
        _checks.check_key(key)
    elif key is not None:
        raise ValueError(
            f"`key` must be left out with rounding={rounding!r}, which draws nothing, got one. "
            "Ask for rounding='stochastic' or leave it out."
        )
    if rounding != "nearest" and jnp.finfo(dtype).bits != 16:
        raise ValueError(
            f"`rounding` must be 'nearest' for a result in {jnp.dtype(dtype).name}, got "
            f"{rounding!r}. The others are for bfloat16 and float16."
        )


def round_sum(total, dtype, rounding, key):
    """Return the sum in `dtype`: an array, or a `CompensatedWeight` for "compensated"."""
    if rounding == "stochastic":
        return _round_stochastically(total, dtype, key)
    high = total.astype(dtype)
    if rounding == "nearest":
        return high
    rest = total - high.astype(total.dtype)
    # Of what is not finite nothing is left over.
    return CompensatedWeight(high, jnp.where(jnp.isfinite(rest), rest, 0).astype(dtype))


def _round_stochastically(total, dtype, key):
    """Return one of the two neighbours, each as likely as the sum is near to it.

    Random bits are added below the last that is kept, and what is below it then is cut off.
    """
    total = total.astype(jnp.float32)
    noise = jax.random.bits(key, total.shape, jnp.uint32)
    dropped = 24 - (jnp.finfo(dtype).nmant + 1)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    cut = ((bits + (noise >> (32 - dropped))) >> dropped) << dropped
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    if dtype == jnp.float16:
        # Below its normal numbers float16 has fixed steps, float32 keeps relative ones.
        step = 2.0**-24
        fraction = (noise >> 8).astype(jnp.float32) * 2.0**-24
        small = jnp.floor(total / step + fraction) * step
        rounded = jnp.where(jnp.abs(total) < 2.0**-14, small, rounded)
    return jnp.where(jnp.isfinite(total), rounded, total).astype(dtype)
