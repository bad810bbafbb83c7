"""Ranks for many layers under one budget of parameters."""

from typing import NamedTuple

import numpy as np

from jlora import _checks
from jlora.rank_selection.spectrum import read_spectrum


def allocate_ranks(
    spectra,
    *,
    budget,
    shapes=None,
    minimum=0,
    maximum=None,
    multiple_of=1,
    weights=None,
):
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
    layers = [
        _read_layer(name, spectra, shapes, minimum, maximum, weights, step)
        for name in names
    ]
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
    values, shape, *_ = read_spectrum(spectra[name], shape, None, f"spectra[{name!r}]")
    m, n = (len(values),) * 2 if shape is None else shape
    least = _checks.check_integer(pick(minimum, 0), f"minimum of {name!r}", minimum=0)
    most = pick(maximum, None)
    most = (
        len(values)
        if most is None
        else _checks.check_integer(most, f"maximum of {name!r}", minimum=0)
    )
    if most < least:
        raise ValueError(
            f"`maximum` of {name!r} must be at least its minimum, {least}, got {most}. "
            "Change one of them."
        )
    weight = float(pick(weights, 1.0))
    if not weight > 0:
        raise ValueError(
            f"`weights` of {name!r} must be positive, got {weight}. Leave it out."
        )
    most = min(most, len(values))
    least = min(-(-least // step) * step, most)
    starts = np.arange(least, most, step)
    if most < len(values):
        starts = starts[
            starts + step <= most
        ]  # only the last values make a broken step
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
                closed[owner] = (
                    True  # ranks are bought in order, the next one costs as much
                )
                if np.all(closed):
                    break
    return ranks.tolist()


def _order_affordable(values, prices, budget):
    """Return indices by falling value, as many as the budget can reach at all."""
    most = min(len(values), int(budget // prices.min()) + 1)
    leading = np.arange(len(values))
    if most < len(values):
        leading = np.sort(np.argpartition(-values, most - 1)[:most])
    # Stable: of equal values in one layer the earlier rank comes first.
    return leading[np.argsort(-values[leading], kind="stable")]
