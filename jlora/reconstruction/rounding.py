"""Float32 sums stored in 16 bits: nearest, stochastic without bias, or in two parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._types import Array, Float, PRNGKey

ROUNDINGS = ("nearest", "stochastic", "compensated")


class CompensatedWeight(NamedTuple):
    """A weight as high + low, two arrays of one dtype; low holds the rounding error.

    Two arrays of bfloat16 hold 16 bits, two of float16 hold 22.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((1, 1), 1e-3), jnp.ones((1, 1)))
        >>> base = jnp.ones((1, 1), jnp.bfloat16)
        >>> merged = jlora.reconstruct(factors, base, rounding="compensated")
        >>> float(merged.high[0, 0]), round(float(merged.low[0, 0]), 5)
        (1.0, 0.001)
    """

    high: Float[Array, "*batch m n"]  # the sum, rounded to the nearest
    low: Float[Array, "*batch m n"]  # the remainder, rounded to the nearest


def check_rounding(rounding: str, key: PRNGKey | None, dtype: Any) -> None:
    """Refuse an unknown rounding, and one that its key or the dtype does not fit."""
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
            f"`key` must be left out with rounding={rounding!r}, which draws nothing, "
            "got one. Ask for rounding='stochastic' or leave it out."
        )

    if rounding != "nearest" and jnp.finfo(dtype).bits != 16:
        raise ValueError(
            f"`rounding` must be 'nearest' for a result in {jnp.dtype(dtype).name}, "
            f"got {rounding!r}. The others are for bfloat16 and float16."
        )


def round_sum(
    total: Float[Array, "*batch m n"], dtype: Any, rounding: str, key: PRNGKey | None
) -> Array | CompensatedWeight:
    """Return the sum in `dtype`, as an array or a `CompensatedWeight`."""
    if rounding == "stochastic":
        assert key is not None
        return _round_stochastically(total, dtype, key)
    high = total.astype(dtype)
    if rounding == "nearest":
        return high

    # The remainder of Inf would be NaN; it is zero.
    remainder = total - high.astype(total.dtype)
    remainder = jnp.where(jnp.isfinite(remainder), remainder, 0)
    return CompensatedWeight(high, remainder.astype(dtype))


def _round_stochastically(
    total: Float[Array, "*batch m n"], dtype: Any, key: PRNGKey
) -> Float[Array, "*batch m n"]:
    """Return one of the two neighbours, with a probability that makes the mean exact.

    Random bits are added below the last kept bit, and then the bits below it are
    dropped.
    """
    total = total.astype(jnp.float32)
    noise = jax.random.bits(key, total.shape, jnp.uint32)
    num_dropped = 24 - (jnp.finfo(dtype).nmant + 1)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    bits = bits + (noise >> (32 - num_dropped))
    truncated = (bits >> num_dropped) << num_dropped
    rounded = jax.lax.bitcast_convert_type(truncated, jnp.float32)

    if dtype == jnp.float16:
        # Below its normal numbers float16 has fixed steps, and float32 relative ones.
        step = 2.0**-24
        fraction = (noise >> 8).astype(jnp.float32) * 2.0**-24
        small = jnp.floor(total / step + fraction) * step
        rounded = jnp.where(jnp.abs(total) < 2.0**-14, small, rounded)
    return jnp.where(jnp.isfinite(total), rounded, total).astype(dtype)
