"""`RankRule` and `RankBudget`: ranks for `Rule` that a plan chooses."""

from __future__ import annotations

import dataclasses

from jlora import _checks
from jlora.rank_selection.rules import RULES


@dataclasses.dataclass(frozen=True)
class RankRule:
    """A rank read from each weight's singular values, for `Rule`; see `choose_rank`.

    Args:
        rule: "energy", "tail", "gap", "gavish_donoho", "marchenko_pastur", "stable" or
            "effective".
        energy, tolerance, noise, margin: as in `choose_rank`.
        minimum, maximum: static limits of the rank; rank 0 leaves the weight unadapted.
            maximum None: min(m, n).
        multiple_of: static, the rank is rounded up to a multiple of it, up to the
            maximum.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> rule = jlora.Rule("w", jlora.RankRule("energy", energy=0.9))
        >>> params = {"w": jnp.diag(jnp.array([4.0, 1.0, 0.1]))}
        >>> jlora.make_plan(params, rule).entries[0].rule.rank
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

    def __post_init__(self) -> None:
        _checks.check_choice(self.rule, RULES, "rule")
        _check_limits(self)


@dataclasses.dataclass(frozen=True)
class RankBudget:
    """Ranks under one budget of parameters, for `Rule`; see `allocate_ranks`.

    All weights whose rules have an equal budget share it, most energy per parameter
    first. For init="eva" the energy is the variance of the activations, as a fraction
    of each layer's own.

    Args:
        parameters: static, the most elements in the factors of all these weights, ≥ 1.
        minimum, maximum: static limits of the rank of a weight; rank 0 leaves it
            unadapted. maximum None: min(m, n).
        multiple_of: static, ranks are multiples of it.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of their range.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> diagonals = {"q": jnp.array([9.0, 1.0]), "k": jnp.array([5.0, 4.0])}
        >>> params = {name: jnp.diag(values) for name, values in diagonals.items()}
        >>> plan = jlora.make_plan(params, jlora.Rule("q|k", jlora.RankBudget(12)))
        >>> [(entry.path, entry.rule.rank) for entry in plan.entries]
        [('k', 2), ('q', 1)]
    """

    parameters: int
    _: dataclasses.KW_ONLY
    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        _checks.check_integer(self.parameters, "parameters")
        _check_limits(self)


def _check_limits(ranks: RankRule | RankBudget) -> None:
    _checks.check_integer(ranks.minimum, "minimum", minimum=0)
    _checks.check_integer(ranks.multiple_of, "multiple_of")
    if ranks.maximum is not None:
        least = max(1, ranks.minimum)
        _checks.check_integer(ranks.maximum, "maximum", minimum=least)
