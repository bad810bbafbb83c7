"""The singular values of one matrix, read from a matrix, an array or an SVD."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from jax.core import Tracer

from jlora import _checks
from jlora._types import AnyArray, Float, Scalar
from jlora.factors import SVD, check_svd

# A matrix, its singular values in descending order, or its truncated SVD.
SpectrumSource: TypeAlias = Float[AnyArray, "_m _n"] | Float[AnyArray, " _k"] | SVD


class Spectrum(NamedTuple):
    """Singular values of a matrix, all or the leading ones, with its shape and norm."""

    values: Float[np.ndarray, " k"]  # descending, float64
    shape: tuple[int, int] | None  # (m, n) of the matrix; None: unknown
    norm: float  # Frobenius norm of the matrix, or of `values` if the rest is unknown
    is_complete: bool  # whether `norm` belongs to the whole matrix


def read_spectrum(
    a: SpectrumSource,
    shape: tuple[int, int] | None,
    norm: Scalar | None,
    name: str = "a",
) -> Spectrum:
    """Return the checked `Spectrum` of one matrix.

    Args:
        a: the matrix, its singular values, or its SVD.
        shape: (m, n) of the matrix. None: read it from a matrix or an SVD.
        norm: Frobenius norm of the matrix. None: the norm of the values.
        name: of the argument, for messages.
    """
    if isinstance(a, tuple):
        u, values, vt = check_svd(a, name)
        shape = (u.shape[-2], vt.shape[-1]) if shape is None else shape
        rule, is_one = "the SVD of one matrix", values.ndim == 1
    else:
        # Do not convert to a JAX array: without x64 that rounds float64 to float32.
        values = _checks.check_floating(a, name)
        rule = "one matrix [m, n] or its singular values [k]"
        is_one = values.ndim in (1, 2) and values.size > 0
    refuse_tracer(values, name)
    if not is_one:
        raise ValueError(
            f"`{name}` must be {rule}, got shape {values.shape}. "
            "Choose the rank of each matrix of a batch by itself."
        )

    values = np.asarray(values, np.float64)
    _checks.check_finite(values, name, xp=np)
    if values.ndim == 2:
        shape = values.shape if shape is None else shape
        values = np.linalg.svd(values, compute_uv=False)
    _check_order(values, name)
    return _complete_spectrum(values, shape, norm)


def _check_order(values: Float[np.ndarray, " k"], name: str) -> None:
    """Refuse values that are negative or not descending."""
    # Values that differ only by float32 rounding may be in any order.
    if np.any(values < 0) or np.any(np.diff(values) > 1e-6 * values[0]):
        raise ValueError(
            f"`{name}` must hold singular values descending and not negative, got "
            f"{np.array2string(values[:4], precision=3)}, ... "
            "Sort them, or pass the matrix [m, n]."
        )


def _complete_spectrum(
    values: Float[np.ndarray, " k"], shape: tuple[int, int] | None, norm: Scalar | None
) -> Spectrum:
    """Return the `Spectrum` after a check that shape and norm fit the values."""
    if shape is not None:
        sizes = tuple(_checks.check_integer(size, "shape") for size in shape)
        if len(sizes) != 2 or len(values) > min(sizes):
            raise ValueError(
                f"`shape` must be (m, n) with min(m, n) of at least {len(values)}, "
                f"the number of singular values, got {sizes}. "
                "Pass the shape of the matrix."
            )
        shape = (sizes[0], sizes[1])

    scale = power_of_two_above(values)
    own_norm = scale * float(np.linalg.norm(values / scale))
    if norm is None:
        has_all_values = shape is None or len(values) == min(shape)
        return Spectrum(values, shape, own_norm, has_all_values)

    norm = float(norm)
    # Leading values in float32 may exceed the norm by rounding.
    if not norm >= own_norm * (1 - 1e-5):
        raise ValueError(
            f"`norm` must be at least {own_norm:.6g}, the norm of the singular values "
            f"given, got {norm:.6g}. Pass the Frobenius norm of the whole matrix."
        )
    return Spectrum(values, shape, max(norm, own_norm), True)


def power_of_two_above(values: Float[np.ndarray, " k"]) -> float:
    """Return a power of two near the largest value, so that squares stay in range."""
    _, exponent = np.frexp(np.max(values, initial=0.0))
    return float(np.ldexp(1.0, min(int(exponent), 1023)))


def to_unit_scale(spectrum: Spectrum) -> tuple[Spectrum, float]:
    """Return the spectrum of the matrix divided by a power of two, and that power."""
    scale = power_of_two_above(spectrum.values)
    values, norm = spectrum.values / scale, spectrum.norm / scale
    return spectrum._replace(values=values, norm=norm), scale


def refuse_tracer(array: object, name: str = "a") -> None:
    """Refuse a traced array where a rank is chosen from its values."""
    if isinstance(array, Tracer):
        raise TypeError(
            f"`{name}` must be a concrete array, got a traced one: a rank decides "
            "shapes. Choose it outside of jax.jit."
        )


def require_whole(spectrum: Spectrum, rule: str) -> None:
    """Refuse a spectrum without the whole norm, for a rule that needs it."""
    if not spectrum.is_complete:
        assert spectrum.shape is not None
        raise ValueError(
            f"`norm` must be given for the rule {rule!r} where only the leading "
            f"{len(spectrum.values)} of {min(spectrum.shape)} singular values are, "
            "got None. Pass the Frobenius norm of the matrix."
        )
