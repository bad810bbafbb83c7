"""The arguments of `reconstruct`, checked and brought into one form."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._columns import Columns, check_columns
from jlora._dispatch import check_usable
from jlora._numerics import common_dtype
from jlora._sharding import is_sharded
from jlora._types import AnyArray, Array, DTypeLike, Float, PRNGKey, Scalar
from jlora.factors import Factors
from jlora.reconstruction.implementations import (
    IMPLEMENTATIONS,
    Bases,
    SumSpec,
)
from jlora.reconstruction.rounding import CompensatedWeight, check_rounding

Base = Float[AnyArray, "*batch m n"] | CompensatedWeight
Rounding = Literal["nearest", "stochastic", "compensated"]


class Arguments(NamedTuple):
    """The checked arguments of a reconstruction."""

    bases: Bases
    u: Array
    v: Array
    scale: Scalar
    key: PRNGKey | None
    indices: Array | None  # columns to compute, if they are no range
    span: tuple[int, int] | None  # static, their start and stop, if they are a range
    spec: SumSpec  # static
    implementation: str | None  # static


def prepare_arguments(
    factors: Factors,
    base: Base | None,
    scale: Scalar,
    columns: Columns | None,
    rounding: Rounding,
    key: PRNGKey | None,
    dtype: DTypeLike | None,
    donate: bool,
    implementation: str | None,
    base_name: str = "base",
) -> Arguments:
    u, v = _checks.check_factors(factors)
    scale = _checks.check_scalar(scale, "scale")
    bases = _check_bases(base, (*u.shape[:-1], v.shape[-1]), base_name)
    if dtype is None:
        dtype = bases[0].dtype if bases else common_dtype(u.dtype, v.dtype)
    dtype = jnp.dtype(dtype)
    check_rounding(rounding, key, dtype)
    indices, span = _read_columns(columns, v.shape[-1])

    # The loop over blocks that a donated base allows would gather a sharded one.
    is_split = any(map(is_sharded, (*bases, u, v)))
    can_donate = bool(donate) and not any(map(is_sharded, bases))
    spec = SumSpec(dtype, rounding, can_donate, is_split)
    if donate:
        _check_donation(bases, spec)
    check_usable(IMPLEMENTATIONS, implementation, (bases, u, v, key), spec)
    return Arguments(bases, u, v, scale, key, indices, span, spec, implementation)


def _check_donation(bases: Bases, spec: SumSpec) -> None:
    num_results = 2 if spec.rounding == "compensated" else 1
    if not 1 <= len(bases) <= num_results or bases[0].dtype != spec.dtype:
        given = ", ".join(str(base.dtype) for base in bases) or "none"
        raise ValueError(
            f"`donate` must come with a base that the result, {spec.dtype}, fits into, "
            f"got {given}. Leave it out."
        )


def _check_bases(base: Base | None, shape: tuple[int, ...], name: str) -> Bases:
    """Return the base as a tuple of none, one or two arrays."""
    if base is None:
        return ()
    if not isinstance(base, CompensatedWeight):
        return (_checks.check_base(base, shape, name),)
    high = _checks.check_base(base.high, shape, f"{name}.high")
    return high, _checks.check_base(base.low, shape, f"{name}.low")


def _read_columns(
    columns: Columns | None, n: int
) -> tuple[Array | None, tuple[int, int] | None]:
    """Return (indices, span): a range of columns is a static span, else indices."""
    if columns is None:
        return None, None
    indices = check_columns(columns, n)
    if isinstance(indices, np.ndarray) and np.all(np.diff(indices) == 1):
        return None, (int(indices[0]), int(indices[-1]) + 1)
    return jnp.asarray(indices), None
