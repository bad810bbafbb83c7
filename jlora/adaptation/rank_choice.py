"""Chooses the ranks that rules leave open: one by one, or under a shared budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _checks
from jlora._numerics import frobenius_norm, to_compute
from jlora._sharding import is_sharded
from jlora._types import AnyArray, Array, PRNGKey
from jlora.adaptation.placements import make_automatic
from jlora.adaptation.rank_rules import RankBudget, RankRule
from jlora.adaptation.rule import Rule
from jlora.factorization.svd import randomized_svd
from jlora.layouts import matrix_shape, view_matrix
from jlora.quantization.registry import read_array
from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.rules import choose_rank
from jlora.rank_selection.spectrum import Spectrum, refuse_tracer


class RankRequest(NamedTuple):
    """A weight whose rank is to be chosen."""

    path: str
    leaf: Any  # array in the layout of the rule
    rule: Rule
    data: Any  # the input of its initializer beside the weight, or None
    key: PRNGKey | None  # for a randomised decomposition; None: a full one


def choose_ranks(requests: list[RankRequest]) -> dict[str, int]:
    """Return {path: rank} of the weights whose rules leave the rank open."""
    ranks: dict[str, int] = {}
    pools: dict[RankBudget, list[tuple[RankRequest, list[Spectrum]]]] = {}
    for request in requests:
        spectra = _measure_spectra(request)
        rank = request.rule.rank
        if isinstance(rank, RankBudget):
            pools.setdefault(rank, []).append((request, spectra))
        elif isinstance(rank, RankRule):
            ranks[request.path] = _choose_by_rule(request, rank, spectra)

    for budget, members in pools.items():
        ranks |= _share_budget(budget, members)
    return ranks


def _choose_by_rule(
    request: RankRequest, rule: RankRule, spectra: list[Spectrum]
) -> int:
    """Return the largest rank that the rule gives to any matrix of the weight."""
    limit = _find_limit(request, rule)
    chosen = 0
    for spectrum in spectra:
        try:
            choice = choose_rank(
                spectrum.values,
                rule.rule,
                energy=rule.energy,
                tolerance=rule.tolerance,
                noise=rule.noise,
                margin=rule.margin,
                shape=spectrum.shape,
                norm=spectrum.norm,
                max_rank=max(1, limit),
            )
        except ValueError as error:
            raise ValueError(f"{request.path}: {error}") from None
        chosen = max(chosen, choice.rank)

    rounded = -(-chosen // rule.multiple_of) * rule.multiple_of
    return min(max(rounded, rule.minimum), limit)


def _share_budget(
    budget: RankBudget, members: list[tuple[RankRequest, list[Spectrum]]]
) -> dict[str, int]:
    spectra, shapes, limits = {}, {}, {}
    for request, parts in members:
        path, limit = request.path, _find_limit(request, budget)
        # A stack gets one rank, which costs as much as one rank in each of its
        # matrices.
        m, n = matrix_shape(request.leaf.shape, request.rule.layout)[-2:]
        shapes[path] = (len(parts) * m, len(parts) * n)
        spectra[path] = _add_spectra(request, parts)[:limit]
        limits[path] = limit

    minimum = {path: min(budget.minimum, limit) for path, limit in limits.items()}
    try:
        ranks: Any = allocate_ranks(
            spectra,
            budget=budget.parameters,
            shapes=shapes,
            minimum=minimum,
            maximum=limits,
            multiple_of=budget.multiple_of,
        )
        return ranks
    except ValueError as error:
        if "`budget`" not in str(error):
            raise
        raise ValueError(
            f"`parameters` of RankBudget must cover rank {budget.minimum} of all "
            f"{len(members)} weights that share it, {_count_least(budget, members)} "
            f"numbers, got {budget.parameters}. Raise it, lower `minimum` or match "
            "fewer weights."
        ) from None


def _add_spectra(request: RankRequest, parts: list[Spectrum]) -> np.ndarray:
    """Return the singular values of a stack, its energies added rank by rank."""
    values = np.sqrt(sum(part.values**2 for part in parts))
    if request.rule.initializer.has_relative_spectrum:
        norm = np.sqrt(sum(part.norm**2 for part in parts))
        values = values / max(norm, 1e-30)
    return values


def _count_least(
    budget: RankBudget, members: list[tuple[RankRequest, list[Spectrum]]]
) -> int:
    """Return the number of parameters that the minimum ranks need."""
    total = 0
    for request, parts in members:
        m, n = matrix_shape(request.leaf.shape, request.rule.layout)[-2:]
        least = -(-budget.minimum // budget.multiple_of) * budget.multiple_of
        total += len(parts) * (m + n) * min(least, _find_limit(request, budget))
    return total


def _find_limit(request: RankRequest, rank: RankRule | RankBudget) -> int:
    m, n = matrix_shape(request.leaf.shape, request.rule.layout)[-2:]
    limit = request.rule.initializer.max_rank(m, n, request.data)
    return limit if rank.maximum is None else min(limit, rank.maximum)


def _measure_spectra(request: RankRequest) -> list[Spectrum]:
    """Return the spectrum of each matrix that decides the rank of a weight."""
    path, leaf, rule, data, key = request
    refuse_tracer(leaf, path)
    refuse_tracer(data, f"data[{path!r}]")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path}: `params` must hold arrays where a rank is chosen by their "
            "values, got an abstract one. Give the rank as a number, or pass the "
            "weights."
        )
    if data is not None:
        _checks.check_finite(data, f"data[{path!r}]")

    assert not isinstance(rule.rank, int)
    maximum = rule.rank.maximum
    return [
        _measure_spectrum(path, matrix, maximum, key)
        for matrix in _list_matrices(leaf, rule, data)
    ]


def _list_matrices(leaf: Any, rule: Rule, data: Any) -> list[AnyArray]:
    """Return the matrices whose singular values decide the rank, one by one."""
    init = rule.initializer
    w = view_matrix(read_array(leaf), rule.layout)
    ws = w.reshape(-1, *w.shape[-2:])
    if is_sharded(ws):
        ws = make_automatic(ws)
        ws = [_replicate_matrix(ws, i) for i in range(len(ws))]
    if data is None:
        return [init.spectrum_matrix(each, None) for each in ws]

    if init.is_data_stored:
        data = view_matrix(data, rule.layout)
    datas = data.reshape(-1, *data.shape[w.ndim - 2 :])
    return [
        init.spectrum_matrix(jnp.asarray(each), jnp.asarray(own))
        for each, own in zip(ws, datas, strict=True)
    ]


def _replicate_matrix(ws: Any, index: int) -> Array:
    """Return one matrix of a sharded stack, whole on every device.

    One matrix at a time is gathered, and the index is static: a traced one would gather
    the stack.
    """
    whole = NamedSharding(ws.sharding.mesh, PartitionSpec())
    return jax.device_put(ws[index], whole)


def _measure_spectrum(
    path: str, a: AnyArray, maximum: int | None, key: PRNGKey | None
) -> Spectrum:
    a = jnp.asarray(a)
    _checks.check_finite(a, path)
    m, n = a.shape
    shape = (m, n)

    # One value more than the maximum, so that the gap after it is seen.
    num_values = min(shape) if key is None or maximum is None else maximum + 1
    if num_values >= min(shape):
        values = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
        return Spectrum(values, shape, float(np.linalg.norm(values)), True)

    assert key is not None
    svd = randomized_svd(a, num_values, key=key)
    norm = float(frobenius_norm(to_compute(a)))
    return Spectrum(np.asarray(svd.s, np.float64), shape, norm, True)
