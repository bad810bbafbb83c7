"""Ranks that a plan chooses: by a rule for each weight, or under one budget for many."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import frobenius_norm, matmul, to_compute
from jlora.factorization.svd import randomized_svd
from jlora.initializers.from_data import square_root
from jlora.initializers.from_weight import INITIALIZATIONS
from jlora.layouts import matrix_shape, view_matrix
from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.rules import RULES, choose_rank
from jlora.rank_selection.spectrum import Spectrum, refuse_tracer


@dataclasses.dataclass(frozen=True)
class RankRule:
    """A rank read from each weight's own singular values, for `Rule`; see `choose_rank`.

    Args:
        rule: "energy", "tail", "gap", "gavish_donoho", "marchenko_pastur", "stable" or
            "effective".
        energy, tolerance, noise, margin: as in `choose_rank`.
        minimum, maximum: static, what the rank is cut to; 0 leaves the weight alone.
            maximum None: min(m, n).
        multiple_of: static, the rank is rounded up to a multiple of it, up to the maximum.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> rule = jlora.Rule("w", jlora.RankRule("energy", energy=0.9))
        >>> plan = jlora.make_plan({"w": jnp.diag(jnp.array([4.0, 1.0, 0.1]))}, rule)
        >>> plan.entries[0].rule.rank
        1
    """

    rule: str = "energy"
    _: dataclasses.KW_ONLY
    energy: float = 0.9
    tolerance: float = 0.1
    noise: float | None = None
    margin: float = 0.0
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def __post_init__(self):
        _checks.check_choice(self.rule, RULES, "rule")
        _check_limits(self)


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Ranks under one budget of parameters, for `Rule`; see `allocate_ranks`.

    All weights whose rules have an equal budget share it: most energy per parameter first. For
    init="eva" the energy is that of the activations, as a part of each layer's own.

    Args:
        parameters: static, the most numbers in the factors of all these weights, ≥ 1.
        minimum, maximum: static, the least and the most rank of a weight; 0 leaves it alone.
            maximum None: min(m, n).
        multiple_of: static, ranks are multiples of it.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"q": jnp.diag(jnp.array([9.0, 1.0])), "k": jnp.diag(jnp.array([5.0, 4.0]))}
        >>> plan = jlora.make_plan(params, jlora.Rule("q|k", jlora.RankBudget(12)))
        >>> [(entry.path, entry.rule.rank) for entry in plan.entries]
        [('k', 2), ('q', 1)]
    """

    parameters: int
    _: dataclasses.KW_ONLY
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def __post_init__(self):
        _checks.check_integer(self.parameters, "parameters")
        _check_limits(self)


def _check_limits(ranks):
    _checks.check_integer(ranks.minimum, "minimum", minimum=0)
    _checks.check_integer(ranks.multiple_of, "multiple_of")
    if ranks.maximum is not None:
        _checks.check_integer(ranks.maximum, "maximum", minimum=max(1, ranks.minimum))


class RankRequest(NamedTuple):
    """A weight whose rank is to be chosen."""

    path: str
    leaf: object  # array of the layout of the rule
    rule: object  # `Rule`
    data: object  # what its initialisation is given beside the weight, or None
    key: object  # for leading singular values by random projection; None: all of them


def choose_ranks(candidates):
    """Return {path: rank} of the `RankRequest`s whose rules leave the rank open."""
    ranks, pools = {}, {}
    for candidate in candidates:
        spectra = _measure_spectra(candidate)
        if isinstance(candidate.rule.rank, RankBudget):
            pools.setdefault(candidate.rule.rank, []).append((candidate, spectra))
        else:
            ranks[candidate.path] = _choose_by_rule(candidate, spectra)
    for budget, members in pools.items():
        ranks |= _share_budget(budget, members)
    return ranks


def _choose_by_rule(candidate, spectra):
    """Return the largest rank that the rule gives to any matrix of the weight."""
    rule, limit = candidate.rule.rank, _find_limit(candidate)
    chosen = 0
    for spectrum in spectra:
        try:
            chosen = max(
                chosen,
                choose_rank(
                    spectrum.values,
                    rule.rule,
                    energy=rule.energy,
                    tolerance=rule.tolerance,
                    noise=rule.noise,
                    margin=rule.margin,
                    shape=spectrum.shape,
                    norm=spectrum.norm,
                    max_rank=max(1, limit),
                ).rank,
            )
        except ValueError as error:
            raise ValueError(f"{candidate.path}: {error}") from None
    rounded = -(-chosen // rule.multiple_of) * rule.multiple_of
    return min(max(rounded, rule.minimum), limit)


def _share_budget(budget, members):
    spectra, shapes, most = {}, {}, {}
    for candidate, parts in members:
        batch = len(parts)
        values = np.sqrt(
            sum(part.values**2 for part in parts)
        )  # one rank for the whole stack
        if candidate.rule.init == "eva":  # as explained variance, which has no unit
            values = values / max(np.sqrt(sum(part.norm**2 for part in parts)), 1e-30)
        m, n = matrix_shape(candidate.leaf.shape, candidate.rule.layout)[-2:]
        limit = _find_limit(candidate)
        spectra[candidate.path] = values[:limit]
        shapes[candidate.path] = (
            batch * m,
            batch * n,
        )  # what one rank of the stack costs
        most[candidate.path] = limit
    try:
        return allocate_ranks(
            spectra,
            budget=budget.parameters,
            shapes=shapes,
            minimum={path: min(budget.minimum, limit) for path, limit in most.items()},
            maximum=most,
            multiple_of=budget.multiple_of,
        )
    except ValueError as error:
        if "`budget`" not in str(error):
            raise
        raise ValueError(
            f"`parameters` of RankBudget must cover rank {budget.minimum} of all {len(members)} "
            f"weights that share it, {_count_least(budget, members)} numbers, got "
            f"{budget.parameters}. Raise it, lower `minimum` or match fewer weights."
        ) from None


def _count_least(budget, members):
    total = 0
    for candidate, parts in members:
        m, n = matrix_shape(candidate.leaf.shape, candidate.rule.layout)[-2:]
        least = -(-budget.minimum // budget.multiple_of) * budget.multiple_of
        total += len(parts) * (m + n) * min(least, _find_limit(candidate))
    return total


def _find_limit(candidate):
    m, n = matrix_shape(candidate.leaf.shape, candidate.rule.layout)[-2:]
    limit = min(m, n) // 2 if candidate.rule.init == "lora_ga" else min(m, n)
    if candidate.rule.init == "eva":
        limit = min(limit, candidate.data.shape[-2])
    maximum = candidate.rule.rank.maximum
    return limit if maximum is None else min(limit, maximum)


def _measure_spectra(candidate):
    """Return the `Spectrum` of each matrix that the initialisation decomposes."""
    path, leaf, rule, data, key = candidate
    refuse_tracer(leaf, path)
    refuse_tracer(data, f"data[{path!r}]")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{path}: `params` must hold arrays where a rank is chosen by their values, got an "
            "abstract one. Give the rank as a number, or pass the weights."
        )
    if data is not None:
        _checks.check_finite(data, f"data[{path!r}]")
    matrices = _list_decomposed(leaf, rule, data)
    return [
        _measure_spectrum(path, matrix, rule.rank.maximum, key) for matrix in matrices
    ]


def _list_decomposed(leaf, rule, data):
    """Return the matrices whose singular values count, [..., m, n] one by one."""
    w, kind = view_matrix(leaf, rule.layout), INITIALIZATIONS[rule.init]
    ws = w.reshape(-1, *w.shape[-2:])
    if kind.decomposes == "w":
        return ws
    data = view_matrix(data, rule.layout) if kind.data_is_stored else data
    datas = data.reshape(-1, *data.shape[-2:])
    if kind.decomposes == "data":
        return datas
    if kind.decomposes == "difference":
        return [
            jnp.subtract(*to_compute(new, old))
            for new, old in zip(datas, ws, strict=True)
        ]
    return [
        matmul(*to_compute(square_root(jnp.asarray(c)), jnp.asarray(w)))
        for c, w in zip(datas, ws, strict=True)
    ]


def _measure_spectrum(path, a, maximum, key):
    a = jnp.asarray(a)
    _checks.check_finite(a, path)
    shape = a.shape
    # One value more than the most, so that the gap behind it is seen.
    num_values = min(shape) if key is None or maximum is None else maximum + 1
    if num_values >= min(shape):
        values = np.linalg.svd(np.asarray(a, np.float64), compute_uv=False)
        return Spectrum(values, shape, float(np.linalg.norm(values)), True)
    svd = randomized_svd(a, num_values, key=key)
    norm = float(frobenius_norm(to_compute(a)))
    return Spectrum(np.asarray(svd.s, np.float64), shape, norm, True)
