"""How many singular values of a matrix to keep: rules.

A rank decides shapes, so this is run eagerly, on NumPy in float64, and gives back Python integers.
"""

import math
from typing import NamedTuple

import numpy as np

from jlora import _checks
from jlora.rank_selection.noise import (
    estimate_noise,
    marchenko_pastur_edge,
    optimal_threshold,
)
from jlora.rank_selection.spectrum import read_spectrum, require_whole

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
    """A rank and the curve it was read from; unpacks as (rank, curve).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> rank, curve = jlora.choose_rank(jnp.array([3.0, 1.0]), "energy", energy=0.9)
        >>> rank, curve.round(2).tolist()
        (1, [0.9, 1.0])
    """

    rank: int
    curve: (
        np.ndarray
    )  # [k] float64, one value for each rank from 1 on; what it is, the rule says


def choose_rank(
    a,
    rule="energy",
    *,
    energy=0.9,
    tolerance=0.1,
    noise=None,
    margin=0.0,
    shape=None,
    norm=None,
    max_rank=None,
):
    """Return the rank that a rule reads from the singular values of a matrix, and its curve.

    "energy": the fewest whose squares sum to `energy` of the whole; the curve is that sum.
    "tail": the fewest that leave at most `tolerance` of the norm; the curve is what is left.
    "gap": where σ_k / σ_{k+1} is largest; the curve is that ratio.
    "gavish_donoho": those above λ(m/n) √max(m, n) times the noise, or ω(m/n) times the median: the
        threshold of least mean square error; the curve is σ_k over it.
    "marchenko_pastur": those above the noise's own edge, (√m + √n) (1 + margin) times it, which
        are told apart from noise; the curve is σ_k over it.
    "stable": ‖a‖_F² / σ_1², rounded up; the curve is Σ_{i≤k} σ_i² / σ_1².
    "effective": the exponential of the entropy of σ_i² / ‖a‖_F², rounded up; the curve is that of
        the leading k.

    Args:
        a: [m, n], a matrix, decomposed in full here; or [k], its singular values in descending
            order, all or the leading ones; or an `SVD`, whose s are the leading ones.
        rule: one of the names above.
        energy: in (0, 1].
        tolerance: in [0, 1).
        noise: standard deviation of the noise of one entry. None: estimated, from the median of
            all singular values, or from `norm` and the leading ones.
        margin: not negative, how far above the edge counts.
        shape: (m, n), needed for singular values alone by the two rules about noise, and to know
            whether they are all. None: that of the matrix or of the SVD; for an array of
            singular values, that they are all.
        norm: ‖a‖_F. None: that of the values given, which must then be all of them where the
            rule needs the whole.
        max_rank: the largest rank to answer. None: as many as there are values.

    Returns:
        `RankChoice`, unpacks as (rank, curve). The rank is 0 where nothing stands out of noise,
        and the largest allowed where a rule is not met.

    Raises:
        TypeError: arguments of the wrong kind, or a traced array.
        ValueError: an unknown rule, a number out of its range, values that are not descending
            and finite, a norm below that of the values, or too few values for the rule.

    Cost: that of the full decomposition for a matrix; else nothing.

    Source: Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3", 2014;
        Marchenko and Pastur 1967; Roy and Vetterli, "The effective rank", 2007.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.choose_rank(jnp.array([8.0, 7.0, 0.2, 0.1]), "gap").rank
        2
    """
    _checks.check_choice(rule, RULES, "rule")
    spectrum = read_spectrum(a, shape, norm)
    limit = len(spectrum.values)
    if max_rank is not None:
        limit = min(limit, _checks.check_integer(max_rank, "max_rank"))
    if rule in ("energy", "tail"):
        rank, curve = _choose_by_norm(spectrum, rule, energy, tolerance)
    elif rule == "gap":
        rank, curve = _choose_by_gap(spectrum, limit)
    elif rule in ("gavish_donoho", "marchenko_pastur"):
        rank, curve = _choose_by_noise(spectrum, rule, noise, margin)
    else:
        rank, curve = _choose_by_count(spectrum, rule)
    return RankChoice(min(rank, limit), curve)


def _choose_by_norm(spectrum, rule, energy, tolerance):
    require_whole(spectrum, rule)
    if not 0 < energy <= 1:
        raise ValueError(
            f"`energy` must lie in (0, 1], got {energy}. It is a part of the whole."
        )
    if not 0 <= tolerance < 1:
        raise ValueError(
            f"`tolerance` must lie in [0, 1), got {tolerance}. It is relative to the norm."
        )
    total = spectrum.norm**2
    if total == 0:
        return 0, np.zeros(len(spectrum.values)) if rule == "tail" else np.ones(
            len(spectrum.values)
        )
    captured = np.cumsum(spectrum.values**2) / total
    if rule == "energy":
        # Sums that are equal but for rounding are equal: the whole of it is always reached.
        return _first(captured >= energy * (1 - 1e-12)), captured
    left = np.sqrt(np.maximum(1 - captured, 0))
    return _first(left <= max(tolerance, 1e-7)), left


def _choose_by_gap(spectrum, limit):
    values = spectrum.values
    if len(values) < 2:
        raise ValueError(
            "`a` must have at least two singular values for the rule 'gap', got 1. "
            "Take another rule."
        )
    # A ratio to zero, or to the rounding of the largest, is no larger than to that rounding.
    floor = max(np.finfo(np.float32).eps * values[0], np.finfo(np.float64).tiny)
    ratios = np.maximum(values[:-1], floor) / np.maximum(values[1:], floor)
    return int(np.argmax(ratios[:limit])) + 1, ratios


def _choose_by_noise(spectrum, rule, noise, margin):
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

    def find_threshold(noise):
        if rule == "gavish_donoho":
            return optimal_threshold(*spectrum.shape, noise)
        return (1 + margin) * marchenko_pastur_edge(*spectrum.shape, noise)

    if noise is None:
        require_whole(spectrum, rule)
        noise = estimate_noise(
            spectrum.values, spectrum.shape, spectrum.norm, find_threshold
        )
    threshold = find_threshold(noise)
    if threshold == 0:
        return int(np.sum(spectrum.values > 0)), np.where(
            spectrum.values > 0, np.inf, 0.0
        )
    return int(np.sum(spectrum.values > threshold)), spectrum.values / threshold


def _choose_by_count(spectrum, rule):
    require_whole(spectrum, rule)
    squares = spectrum.values**2
    if squares[0] == 0:
        return 0, np.zeros(len(squares))
    if rule == "stable":
        curve = np.cumsum(squares) / squares[0]
        return math.ceil(round(spectrum.norm**2 / squares[0], 9)), curve
    if len(squares) < min(spectrum.shape or (len(squares),)):
        raise ValueError(
            f"`a` must have all {min(spectrum.shape)} singular values for the rule 'effective', "
            f"got {len(squares)}. Take another rule, or pass the matrix."
        )
    # Of the leading k: entropy of the squares over their sum.
    total = np.cumsum(squares)
    logs = np.log(np.where(squares > 0, squares, 1))
    curve = np.exp(np.log(total) - np.cumsum(squares * logs) / total)
    return math.ceil(round(float(curve[-1]), 9)), curve


def _first(is_enough):
    """Return the first rank at which a rule is met, or the last rank."""
    return int(np.argmax(is_enough)) + 1 if np.any(is_enough) else len(is_enough)
