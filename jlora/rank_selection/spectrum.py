"""The singular values of one matrix, read from what a user has of them."""

from typing import NamedTuple

import jax
import numpy as np

from jlora import _checks
from jlora.factors import check_svd


class Spectrum(NamedTuple):
    """Singular values, and what is known of the matrix that they are of."""

    values: np.ndarray  # [k] descending
    shape: tuple | None
    norm: float
    is_complete: bool  # whether `values` are all, or `norm` tells the rest


def read_spectrum(a, shape, norm, name="a"):
    """Return the `Spectrum` of a matrix, of its singular values, or of an `SVD`, checked."""
    if isinstance(a, tuple):
        u, values, vt = check_svd(a, name)
        shape = (u.shape[-2], vt.shape[-1]) if shape is None else shape
        kind, is_one = "the SVD of one matrix", values.ndim == 1
    else:
        # Not as a JAX array, which would halve a float64 one.
        values = _checks.check_floating(a, name)
        kind = "one matrix [m, n] or its singular values [k]"
        is_one = values.ndim in (1, 2) and values.size > 0
    refuse_tracer(values, name)
    if not is_one:
        raise ValueError(
            f"`{name}` must be {kind}, got shape {values.shape}. "
            "Choose the rank of each matrix of a batch by itself."
        )
    values = np.asarray(values, np.float64)
    _check_finite(values, name)
    if values.ndim == 2:
        shape = values.shape if shape is None else shape
        values = np.linalg.svd(values, compute_uv=False)
    _check_order(values, name)
    return _complete_spectrum(values, shape, norm)


def _complete_spectrum(values, shape, norm):
    own = float(np.linalg.norm(values))
    if shape is not None:
        shape = tuple(_checks.check_integer(size, "shape") for size in shape)
        if len(shape) != 2 or len(values) > min(shape):
            raise ValueError(
                f"`shape` must be (m, n) with min(m, n) of at least {len(values)}, the number of "
                f"singular values, got {shape}. Pass the shape of the matrix."
            )
    if norm is None:
        return Spectrum(values, shape, own, shape is None or len(values) == min(shape))
    norm = float(norm)
    # Leading values in float32 may exceed the norm by rounding.
    if not norm >= own * (1 - 1e-5):
        raise ValueError(
            f"`norm` must be at least that of the singular values given, {own:.6g}, got {norm:.6g}."
            " Pass the Frobenius norm of the whole matrix."
        )
    return Spectrum(values, shape, max(norm, own), True)


def refuse_tracer(array, name="a"):
    """Refuse a traced array where a rank is to be chosen."""
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be a concrete array, got a traced one: a rank decides shapes. "
            "Choose it outside of jax.jit."
        )


def _check_finite(values, name):
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"`{name}` must be finite, got NaN or Inf. Repair it or leave it out."
        )


def _check_order(values, name):
    # Values that are equal but for rounding in float32 may stand in any order.
    if np.any(values < 0) or np.any(np.diff(values) > 1e-6 * values[0]):
        raise ValueError(
            f"`{name}` must hold singular values descending and not negative, got "
            f"{np.array2string(values[:4], precision=3)}, ... Sort them, or pass the matrix [m, n]."
        )


def require_whole(spectrum, rule):
    """Refuse a spectrum of which only a part is known, for a rule about the whole."""
    if not spectrum.is_complete:
        raise ValueError(
            f"`norm` must be given for the rule {rule!r} where only the leading "
            f"{len(spectrum.values)} of {min(spectrum.shape)} singular values are, got None. "
            "Pass the Frobenius norm of the matrix."
        )
