"""How many singular values to keep: rules for one matrix, and a budget over many.

Ranks decide shapes, so these functions are run eagerly, on NumPy in float64, and give back Python
integers.
"""

import math
import operator
from typing import NamedTuple

import jax
import numpy as np

from jlora import _checks
from jlora.factorization.noise import (
    estimate_noise,
    marchenko_pastur_edge,
    optimal_threshold,
)
from jlora.factors import check_svd

RULES = ("energy", "tail", "gap", "gavish_donoho", "marchenko_pastur", "stable", "effective")


class RankChoice(NamedTuple):
    """A rank and the curve it was read from; unpacks as (rank, curve).

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> rank, curve = jlora.choose_rank(jnp.array([3.0, 1.0]), "energy", energy=0.9)
        >>> rank, curve.round(2).tolist()
        (1, [0.9, 1.0])
    """

    rank: int
    curve: np.ndarray  # [k] float64, one value for each rank from 1 on; what it is, the rule says


def choose_rank(a, rule="energy", *, energy=0.9, tolerance=0.1, noise=None, margin=0.0,
                shape=None, norm=None, max_rank=None):  # fmt: skip
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
    spectrum = _read_spectrum(a, shape, norm)
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


class _Spectrum(NamedTuple):
    values: np.ndarray  # [k] descending
    shape: tuple | None
    norm: float
    is_complete: bool  # whether `values` are all, or `norm` tells the rest


def _read_spectrum(a, shape, norm):
    if isinstance(a, tuple):
        u, s, vt = check_svd(a)
        _refuse_tracer(s)
        if s.ndim != 1:
            raise ValueError(
                f"`a` must be the SVD of one matrix, got s of shape {s.shape}. "
                "Choose the rank of each matrix of a batch by itself."
            )
        shape = (u.shape[-2], vt.shape[-1]) if shape is None else shape
        values = np.asarray(s, np.float64)
    else:
        a = _checks.check_array(a, "a")
        _refuse_tracer(a)
        if a.ndim not in (1, 2) or a.size == 0:
            raise ValueError(
                f"`a` must be one matrix [m, n] or its singular values [k], got shape {a.shape}. "
                "Choose the rank of each matrix of a batch by itself."
            )
        values = np.asarray(a, np.float64)
        if values.ndim == 2:
            shape = values.shape if shape is None else shape
            _check_finite(values)
            values = np.linalg.svd(values, compute_uv=False)
    _check_values(values)
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
        return _Spectrum(values, shape, own, shape is None or len(values) == min(shape))
    norm = float(norm)
    # Leading values in float32 may exceed the norm by rounding.
    if not norm >= own * (1 - 1e-5):
        raise ValueError(
            f"`norm` must be at least that of the singular values given, {own:.6g}, got {norm:.6g}."
            " Pass the Frobenius norm of the whole matrix."
        )
    return _Spectrum(values, shape, max(norm, own), True)


def _refuse_tracer(array):
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            "`a` must be a concrete array, got a traced one: a rank decides shapes. "
            "Choose it outside of jax.jit."
        )


def _check_finite(values):
    if not np.all(np.isfinite(values)):
        raise ValueError("`a` must be finite, got NaN or Inf. Repair it or leave it out.")


def _check_values(values):
    _check_finite(values)
    if np.any(values < 0) or np.any(np.diff(values) > 1e-6 * values[0]):
        raise ValueError(
            "singular values must be descending and not negative, got "
            f"{np.array2string(values[:4], precision=3)}, ... Sort them, or pass the matrix [m, n]."
        )


def _choose_by_norm(spectrum, rule, energy, tolerance):
    _require_whole(spectrum, rule)
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must lie in (0, 1], got {energy}. It is a part of the whole.")
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
        # The whole of it is the sum, rounding or not.
        return _first(captured >= min(energy, 1 - 1e-12)), captured
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
        raise ValueError(f"`noise` must be positive, got {noise}. Leave it out to estimate it.")
    if not margin >= 0:
        raise ValueError(f"`margin` must not be negative, got {margin}. 0 is the edge itself.")

    def find_threshold(noise):
        if rule == "gavish_donoho":
            return optimal_threshold(*spectrum.shape, noise)
        return (1 + margin) * marchenko_pastur_edge(*spectrum.shape, noise)

    if noise is None:
        _require_whole(spectrum, rule)
        noise = estimate_noise(spectrum.values, spectrum.shape, spectrum.norm, find_threshold)
    threshold = find_threshold(noise)
    if threshold == 0:
        return int(np.sum(spectrum.values > 0)), np.where(spectrum.values > 0, np.inf, 0.0)
    return int(np.sum(spectrum.values > threshold)), spectrum.values / threshold


def _choose_by_count(spectrum, rule):
    _require_whole(spectrum, rule)
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


def _require_whole(spectrum, rule):
    if not spectrum.is_complete:
        raise ValueError(
            f"`norm` must be given for the rule {rule!r} where only the leading "
            f"{len(spectrum.values)} of {min(spectrum.shape)} singular values are, got None. "
            "Pass the Frobenius norm of the matrix."
        )


def _first(is_enough):
    """Return the first rank at which a rule is met, or the last rank."""
    return int(np.argmax(is_enough)) + 1 if np.any(is_enough) else len(is_enough)


def allocate_ranks(spectra, *, budget, shapes=None, minimum=0, maximum=None, multiple_of=1,
                   weights=None):  # fmt: skip
    """Return a rank for each layer, most energy under one budget of parameters.

    A rank of a layer costs m + n parameters and captures σ_k². Ranks are bought in the order of
    energy per parameter, over all layers at once; one that no longer fits is left for cheaper
    ones. This is the optimum but for the last few parameters, which no whole rank fits into.

    Args:
        spectra: {name: spectrum} or a sequence of them: an `SVD`, or singular values [k] in
            descending order. More ranks than values are not given.
        budget: the most parameters, Σ rank (m + n).
        shapes: (m, n) of each, in the form of `spectra`. None: those of the SVDs; k×k for arrays.
        minimum, maximum: the least and the most rank, one number or one for each in the form of
            `spectra`. A minimum is cut to the number of values. None: no maximum.
        multiple_of: ranks are multiples of this, such as 8, but for a layer's last values.
        weights: positive, what a unit of energy of each layer is worth, in the form of
            `spectra`. None: the same.

    Returns:
        Ranks, {name: int} or [int].

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: no layer, values that are not descending and finite, numbers out of range, or
            a budget that is smaller than the minimum ranks need.

    Cost: O(N) for N values in all, and O(T log T) for the T that are bought.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> spectra = {"q": jnp.array([9.0, 1.0]), "k": jnp.array([5.0, 4.0])}
        >>> jlora.allocate_ranks(spectra, budget=12)
        {'q': 1, 'k': 2}
    """
    names = list(spectra) if isinstance(spectra, dict) else list(range(len(spectra)))
    if not names:
        raise ValueError("`spectra` must hold at least one layer, got none. Pass some.")
    budget = _checks.check_integer(budget, "budget", minimum=0)
    step = _checks.check_integer(multiple_of, "multiple_of")
    layers = [_read_layer(name, spectra, shapes, minimum, maximum, weights, step) for name in names]
    needed = sum(layer.least * layer.cost for layer in layers)
    if needed > budget:
        raise ValueError(
            f"`budget` must cover the minimum ranks, {needed} parameters, got {budget}. "
            "Raise it or lower `minimum`."
        )
    ranks = _buy_ranks(layers, budget - needed, step)
    return dict(zip(names, ranks, strict=True)) if isinstance(spectra, dict) else ranks


class _Layer(NamedTuple):
    cost: int  # parameters of one rank
    least: int
    most: int
    gains: np.ndarray  # energy of each further step of ranks above the least
    sizes: np.ndarray  # ranks in each step


def _read_layer(name, spectra, shapes, minimum, maximum, weights, step):
    def pick(values, default):
        if values is None:
            return default
        return values[name] if isinstance(values, (dict, list, tuple)) else values

    shape = None if shapes is None else shapes[name]
    values, shape, *_ = _read_spectrum(spectra[name], shape, None)
    m, n = (len(values),) * 2 if shape is None else shape
    least = _checks.check_integer(pick(minimum, 0), f"minimum of {name!r}", minimum=0)
    most = pick(maximum, None)
    most = len(values) if most is None else _checks.check_integer(
        most, f"maximum of {name!r}", minimum=0
    )  # fmt: skip
    if most < least:
        raise ValueError(
            f"`maximum` of {name!r} must be at least its minimum {least}, got {most}. "
            "Change one of them."
        )
    weight = float(pick(weights, 1.0))
    if not weight > 0:
        raise ValueError(f"`weights` of {name!r} must be positive, got {weight}. Leave it out.")
    most = min(most, len(values))
    least = min(-(-least // step) * step, most)
    starts = np.arange(least, most, step)
    if most < len(values):
        starts = starts[starts + step <= most]  # only the last values make a broken step
    squares = weight * values[:most] ** 2
    gains = np.add.reduceat(squares, starts) if len(starts) else np.zeros(0)
    sizes = np.minimum(starts + step, most) - starts
    return _Layer(m + n, least, most, gains, sizes)


def _buy_ranks(layers, budget, step):
    """Return the rank of each layer once the budget is spent."""
    owners = np.repeat(np.arange(len(layers)), [len(layer.gains) for layer in layers])
    sizes = np.concatenate([layer.sizes for layer in layers])
    prices = sizes * np.array([layer.cost for layer in layers])[owners]
    values = np.concatenate([layer.gains for layer in layers]) / np.maximum(prices, 1)
    ranks = np.array([layer.least for layer in layers])
    if len(values):
        closed = np.zeros(len(layers), bool)
        for index in _order_affordable(values, prices, budget):
            owner = owners[index]
            if closed[owner]:
                continue
            if prices[index] <= budget:
                budget -= prices[index]
                ranks[owner] += sizes[index]
            else:
                closed[owner] = True  # ranks are bought in order, the next one costs as much
                if np.all(closed):
                    break
    return [operator.index(rank) for rank in ranks]


def _order_affordable(values, prices, budget):
    """Return indices by falling value, as many as the budget can reach at all."""
    most = min(len(values), int(budget // prices.min()) + 1)
    leading = np.arange(len(values))
    if most < len(values):
        leading = np.sort(np.argpartition(-values, most - 1)[:most])
    # Stable: of equal values in one layer the earlier rank comes first.
    return leading[np.argsort(-values[leading], kind="stable")]
