"""Rules for the rank of one matrix: how many of its singular values to keep.

A rank decides shapes, so the rules run eagerly and return Python integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jlora import _checks
from jlora._types import Bool, Float, Scalar
from jlora.rank_selection.noise import (
    estimate_noise,
    marchenko_pastur_edge,
    optimal_threshold,
)
from jlora.rank_selection.spectrum import (
    Spectrum,
    SpectrumSource,
    read_spectrum,
    require_whole,
    to_unit_scale,
)

RULES = (
    "energy",
    "tail",
    "gap",
    "gavish_donoho",
    "marchenko_pastur",
    "stable",
    "effective",
)


class RankChoice(NamedTuple):
    """A rank and the curve that it was read from; unpacks as (rank, curve).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> rank, curve = jlora.choose_rank(jnp.array([3.0, 1.0]), "energy", energy=0.9)
        >>> rank, curve.round(2).tolist()
        (1, [0.9, 1.0])
    """

    rank: int
    curve: Float[np.ndarray, " k"]  # one value for each rank 1, 2, ...


def choose_rank(
    a: SpectrumSource,
    rule: str = "energy",
    *,
    energy: float = 0.9,
    tolerance: float = 0.1,
    noise: float | None = None,
    margin: float = 0.0,
    shape: tuple[int, int] | None = None,
    norm: Scalar | None = None,
    max_rank: int | None = None,
) -> RankChoice:
    """Return the rank that a rule reads from the singular values of a matrix.

    The rules, with σ_k the singular values of a:

    - "energy": the smallest rank whose Σ σ_i² is at least `energy` of ‖a‖_F². The curve
      is that fraction.
    - "tail": the smallest rank whose truncation error is at most `tolerance` of ‖a‖_F.
      The curve is the relative error.
    - "gap": the k with the largest σ_k / σ_{k+1}. The curve is that ratio.
    - "gavish_donoho": the number of σ_k above the threshold of least mean square error,
      λ(m/n) √max(m, n) noise, or ω(m/n) times the median. The curve is σ_k over the
      threshold.
    - "marchenko_pastur": the number of σ_k above the largest singular value of pure
      noise, (√m + √n) (1 + margin) noise. Those are distinguishable from noise. The
      curve is σ_k over the threshold.
    - "stable": ‖a‖_F² / σ_1², rounded up. The curve is Σ_{i≤k} σ_i² / σ_1².
    - "effective": exp of the entropy of σ_i² / ‖a‖_F², rounded up. The curve is the
      same for the leading k values.

    Args:
        a: a matrix [m, n], which is decomposed in full; or its singular values [k] in
            descending order, all or the leading ones; or an `SVD`, whose s are the
            leading ones.
        rule: one of the names above.
        energy: fraction of the squared norm, in (0, 1].
        tolerance: relative error in the Frobenius norm, in [0, 1).
        noise: standard deviation of the noise in one entry. None: estimate it, from the
            median of all singular values, or from `norm` and the leading ones.
        margin: relative distance above the noise's edge, not negative.
        shape: (m, n). The two rules about noise need it if `a` is an array of singular
            values. None: the shape of the matrix or of the SVD; an array then holds all
            singular values.
        norm: ‖a‖_F. None: the norm of the values given, which must be all values if the
            rule needs the whole norm.
        max_rank: the largest rank to return. None: the number of values.

    Returns:
        `RankChoice`, unpacks as (rank, curve). The rank is 0 if nothing rises above the
        noise, and the largest allowed rank if no smaller one meets the rule.

    Raises:
        TypeError: an argument of the wrong kind, or a traced array.
        ValueError: an unknown rule, a number out of its range, values that are not
            descending and finite, a norm below the norm of the values, or too few
            values for the rule.

    Cost: a full decomposition if `a` is a matrix; else negligible.

    Source: Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3",
        2014; Marchenko and Pastur 1967; Roy and Vetterli, "The effective rank", 2007.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.choose_rank(jnp.array([8.0, 7.0, 0.2, 0.1]), "gap").rank
        2
    """
    _checks.check_choice(rule, RULES, "rule")
    spectrum, scale = to_unit_scale(read_spectrum(a, shape, norm))
    limit = len(spectrum.values)
    if max_rank is not None:
        limit = min(limit, _checks.check_integer(max_rank, "max_rank"))

    if rule in ("energy", "tail"):
        rank, curve = _choose_by_norm(spectrum, rule, energy, tolerance)
    elif rule == "gap":
        rank, curve = _choose_by_gap(spectrum, limit)
    elif rule in ("gavish_donoho", "marchenko_pastur"):
        rank, curve = _choose_by_noise(spectrum, scale, rule, noise, margin)
    elif rule == "stable":
        rank, curve = _choose_stable(spectrum)
    else:
        rank, curve = _choose_effective(spectrum)
    return RankChoice(min(rank, limit), curve)


def _choose_by_norm(
    spectrum: Spectrum, rule: str, energy: float, tolerance: float
) -> tuple[int, Float[np.ndarray, " k"]]:
    """Return rank and curve of "energy" or "tail"."""
    require_whole(spectrum, rule)
    check = _checks.check_interval
    check(energy, "energy", 0, 1, closed="right", advice="It is a part of the whole.")
    advice = "It is relative to the norm."
    check(tolerance, "tolerance", 0, 1, closed="left", advice=advice)

    total = spectrum.norm**2
    if total == 0:
        curve = np.zeros_like if rule == "tail" else np.ones_like
        return 0, curve(spectrum.values)
    captured = np.cumsum(spectrum.values**2) / total
    if rule == "energy":
        # Allow for rounding of the sum, so that energy=1 is always reached.
        return _find_first(captured >= energy * (1 - 1e-12)), captured
    error = np.sqrt(np.maximum(1 - captured, 0))
    return _find_first(error <= max(tolerance, 1e-7)), error


def _choose_by_gap(
    spectrum: Spectrum, limit: int
) -> tuple[int, Float[np.ndarray, " k"]]:
    """Return rank and curve of "gap"."""
    values = spectrum.values
    if len(values) < 2:
        raise ValueError(
            "`a` must have at least two singular values for the rule 'gap', got 1. "
            "Take another rule."
        )

    # Values below the rounding error of the largest count as that rounding error, or a
    # ratio between two of them would be the largest.
    floor = max(np.finfo(np.float32).eps * values[0], np.finfo(np.float64).tiny)
    ratios = np.maximum(values[:-1], floor) / np.maximum(values[1:], floor)
    return int(np.argmax(ratios[:limit])) + 1, ratios


def _choose_by_noise(
    spectrum: Spectrum, scale: float, rule: str, noise: float | None, margin: float
) -> tuple[int, Float[np.ndarray, " k"]]:
    """Return rank and curve of "gavish_donoho" or "marchenko_pastur".

    The spectrum is of the matrix divided by `scale`; the noise is of the matrix.
    """
    if spectrum.shape is None:
        raise ValueError(
            f"`shape` must be given for the rule {rule!r}, got None. "
            "Pass (m, n), the shape of the matrix."
        )
    if noise is not None and not noise > 0:
        raise ValueError(
            f"`noise` must be positive, got {noise}. Leave it out to estimate it."
        )
    if not margin >= 0:
        raise ValueError(
            f"`margin` must not be negative, got {margin}. 0 is the edge itself."
        )

    m, n = spectrum.shape
    values = spectrum.values

    def find_threshold(noise: float) -> float:
        if rule == "gavish_donoho":
            return optimal_threshold(m, n, noise)
        return (1 + margin) * marchenko_pastur_edge(m, n, noise)

    if noise is None:
        require_whole(spectrum, rule)
        noise = estimate_noise(values, spectrum.shape, spectrum.norm, find_threshold)
    else:
        noise = noise / scale
    threshold = find_threshold(noise)
    if threshold == 0:
        return int(np.sum(values > 0)), np.where(values > 0, np.inf, 0.0)
    return int(np.sum(values > threshold)), values / threshold


def _choose_stable(spectrum: Spectrum) -> tuple[int, Float[np.ndarray, " k"]]:
    """Return rank and curve of "stable"."""
    require_whole(spectrum, "stable")
    squares = spectrum.values**2
    if squares[0] == 0:
        return 0, np.zeros_like(squares)

    curve = np.cumsum(squares) / squares[0]
    return math.ceil(round(spectrum.norm**2 / squares[0], 9)), curve


def _choose_effective(spectrum: Spectrum) -> tuple[int, Float[np.ndarray, " k"]]:
    """Return rank and curve of "effective"."""
    require_whole(spectrum, "effective")
    squares = spectrum.values**2
    if squares[0] == 0:
        return 0, np.zeros_like(squares)
    if spectrum.shape is not None and len(squares) < min(spectrum.shape):
        raise ValueError(
            f"`a` must have all {min(spectrum.shape)} singular values for the rule "
            f"'effective', got {len(squares)}. Take another rule, or pass the matrix."
        )

    # The entropy of p_i = σ_i² / total is log(total) - Σ σ_i² log(σ_i²) / total.
    total = np.cumsum(squares)
    logs = np.log(np.where(squares > 0, squares, 1))
    curve = np.exp(np.log(total) - np.cumsum(squares * logs) / total)
    return math.ceil(round(float(curve[-1]), 9)), curve


def _find_first(is_enough: Bool[np.ndarray, " k"]) -> int:
    """Return the first rank that meets a rule, or the last rank if none does."""
    return int(np.argmax(is_enough)) + 1 if np.any(is_enough) else len(is_enough)
