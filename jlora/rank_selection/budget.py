"""Ranks of many layers under one budget of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from jlora import _checks
from jlora._types import Bool, Float, Int
from jlora.rank_selection.spectrum import (
    SpectrumSource,
    power_of_two_above,
    read_spectrum,
)

T = TypeVar("T")
Layers: TypeAlias = dict[Any, T] | Sequence[T]  # by name, or by position


def allocate_ranks(
    spectra: Layers[SpectrumSource],
    *,
    budget: int,
    shapes: Layers[tuple[int, int]] | None = None,
    minimum: int | Layers[int] = 0,
    maximum: int | Layers[int] | None = None,
    multiple_of: int = 1,
    weights: float | int | Layers[float | int] | None = None,
) -> dict[Any, int] | list[int]:
    """Return a rank for each layer that keeps the most energy under one budget.

    One more rank of a layer costs m + n parameters and captures σ_k². Ranks of all
    layers are bought in the order of energy per parameter. If the next one of a layer
    no longer fits, the other layers follow. The energy misses the optimum by less than
    the best rank that no longer fits. A rank without energy is not bought.

    Args:
        spectra: {name: spectrum} or a sequence of spectra. A spectrum is an `SVD`, or
            singular values [k] in descending order. No rank exceeds their number.
        budget: the most parameters, Σ rank (m + n).
        shapes: (m, n) of each layer, a dict or a sequence like `spectra`. None: the
            shapes of the SVDs, or k×k for arrays.
        minimum: the smallest rank, one number or one per layer, like `spectra`. At most
            the number of values is used.
        maximum: the largest rank, one number or one per layer. None: no maximum.
        multiple_of: ranks are multiples of it, such as 8. Only the last values of a
            layer may form a smaller step.
        weights: the value of a unit of energy, positive, one number or one per layer.
            None: 1.

    Returns:
        Ranks, {name: int} or [int].

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no layer, values that are not descending and finite, a number out of
            its range, or a budget too small for the minimum ranks.

    Cost: O(N log N) for N values in all.

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
    requests = [
        _read_request(name, spectra, shapes, minimum, maximum, weights)
        for name in names
    ]
    scale = max(power_of_two_above(request.values) for request in requests)
    layers = [_plan_layer(request, step, scale) for request in requests]

    needed = sum(layer.least * layer.cost for layer in layers)
    if needed > budget:
        raise ValueError(
            f"`budget` must cover the minimum ranks, {needed} parameters, "
            f"got {budget}. Raise it or lower `minimum`."
        )
    ranks = _buy_ranks(layers, budget - needed)
    return dict(zip(names, ranks, strict=True)) if isinstance(spectra, dict) else ranks


class _Request(NamedTuple):
    """The arguments about one layer, checked."""

    values: Float[np.ndarray, " k"]  # singular values, descending
    shape: tuple[int, int]
    minimum: int
    maximum: int
    weight: float  # value of a unit of energy


class _Layer(NamedTuple):
    """The steps by which the rank of one layer can grow from `least`."""

    cost: int  # parameters of one rank
    least: int
    gains: Float[np.ndarray, " t"]  # energy of each step
    sizes: Int[np.ndarray, " t"]  # ranks in each step


def _read_request(
    name: Any,
    spectra: Layers[Any],  # `SpectrumSource`s, each of a length of its own
    shapes: Layers[tuple[int, int]] | None,
    minimum: int | Layers[int],
    maximum: int | Layers[int] | None,
    weights: float | int | Layers[float | int] | None,
) -> _Request:
    """Return the request of the layer `name`, or refuse it."""
    shape = None if shapes is None else shapes[name]
    spectrum = read_spectrum(spectra[name], shape, None, f"spectra[{name!r}]")
    values = spectrum.values
    shape = (len(values), len(values)) if spectrum.shape is None else spectrum.shape

    least = _pick(minimum, name, 0)
    least = _checks.check_integer(least, f"minimum of {name!r}", minimum=0)
    most = _pick(maximum, name, None)
    most = len(values) if most is None else most
    most = _checks.check_integer(most, f"maximum of {name!r}", minimum=0)
    if most < least:
        raise ValueError(
            f"`maximum` of {name!r} must be at least its minimum, {least}, got {most}. "
            "Change one of them."
        )

    weight = float(_pick(weights, name, 1.0))
    if not weight > 0:
        raise ValueError(
            f"`weights` of {name!r} must be positive, got {weight}. Leave it out."
        )
    return _Request(values, shape, least, most, weight)


def _pick(setting: Any, name: Any, default: Any) -> Any:
    """Return the setting of one layer: one value for all layers, or one per layer."""
    if setting is None:
        return default
    return setting[name] if isinstance(setting, (dict, list, tuple)) else setting


def _plan_layer(request: _Request, step: int, scale: float) -> _Layer:
    """Return the layer's steps of `step` ranks, their energy in units of scale²."""
    num_values = len(request.values)
    most = min(request.maximum, num_values)
    least = min(-(-request.minimum // step) * step, most)

    starts = np.arange(least, most, step)
    if most < num_values:
        # Only the last values of a layer may form a smaller step.
        starts = starts[starts + step <= most]
    squares = request.weight * (request.values[:most] / scale) ** 2
    gains = np.add.reduceat(squares, starts) if len(starts) else np.zeros(0)
    sizes = np.minimum(starts + step, most) - starts
    return _Layer(sum(request.shape), least, gains, sizes)


def _buy_ranks(layers: Sequence[_Layer], budget: int) -> list[int]:
    """Return the ranks after `budget` is spent on steps above the least ranks."""
    owners = np.repeat(np.arange(len(layers)), [len(layer.gains) for layer in layers])
    sizes = np.concatenate([layer.sizes for layer in layers])
    prices = sizes * np.array([layer.cost for layer in layers])[owners]
    gains = np.concatenate([layer.gains for layer in layers])
    ranks = np.array([layer.least for layer in layers])

    budget = min(budget, int(prices.sum()))  # the sums below are of 64 bits
    values = gains / np.maximum(prices, 1)
    rest = np.flatnonzero(gains > 0)
    is_open = np.ones(len(layers), bool)
    while len(rest):
        steps, rest = _split_leading(rest, values, prices, budget)
        while len(steps):
            # Buy the leading steps that fit together.
            spent = np.cumsum(prices[steps])
            num_bought = int(np.searchsorted(spent, budget, side="right"))
            bought, steps = steps[:num_bought], steps[num_bought:]
            np.add.at(ranks, owners[bought], sizes[bought])
            budget -= int(prices[bought].sum())

            fits = _find_open(owners[steps], prices[steps], budget)
            is_open[owners[steps[~fits]]] = False
            steps = steps[fits]
        rest = rest[is_open[owners[rest]]]
        rest = rest[_find_open(owners[rest], prices[rest], budget)]
    return ranks.tolist()


def _split_leading(
    steps: Int[np.ndarray, " t"],
    values: Float[np.ndarray, " all"],
    prices: Int[np.ndarray, " all"],
    budget: int,
) -> tuple[Int[np.ndarray, " leading"], Int[np.ndarray, " rest"]]:
    """Return the most valuable steps, best first, and the others in their order.

    There are at least as many as the budget can buy, plus one, so that sorting the
    others can wait. Equal values stay together and in their order, which keeps the
    ranks of a layer in theirs.
    """
    own = values[steps]
    is_leading = np.ones(len(steps), bool)
    count = budget // max(int(prices[steps].min()), 1) + 1
    if count < len(steps):
        is_leading = own >= np.partition(own, len(own) - count)[len(own) - count]

    leading = steps[is_leading]
    order = np.argsort(-values[leading], kind="stable")
    return leading[order], steps[~is_leading]


def _find_open(
    owners: Int[np.ndarray, " t"], prices: Int[np.ndarray, " t"], budget: int
) -> Bool[np.ndarray, " t"]:
    """Return which steps belong to a layer whose next step fits into the budget.

    The ranks of a layer are bought in order, so a step that is too dear closes it.
    """
    next_owners, next_steps = np.unique(owners, return_index=True)
    closed = next_owners[prices[next_steps] > budget]
    return ~np.isin(owners, closed)
