"""Spectra → ranks: rules, a shared budget, cross-validation. Eager NumPy in float64."""

from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.cross_validation import cross_validate_rank
from jlora.rank_selection.rules import RankChoice, choose_rank

__all__ = ["RankChoice", "allocate_ranks", "choose_rank", "cross_validate_rank"]
