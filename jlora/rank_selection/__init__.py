"""Spectra → ranks. Everything here runs eagerly, on NumPy in float64.

rules             `choose_rank`: the rank of one matrix, by a rule
budget            `allocate_ranks`: ranks of many layers, under one budget of parameters
cross_validation  `cross_validate_rank`: the rank that best predicts held-out entries
spectrum          reads the singular values from a matrix, an array of them, or an SVD
noise             thresholds for the singular values of a noise matrix
"""

from jlora.rank_selection.budget import allocate_ranks
from jlora.rank_selection.cross_validation import cross_validate_rank
from jlora.rank_selection.rules import RankChoice, choose_rank

__all__ = ["RankChoice", "allocate_ranks", "choose_rank", "cross_validate_rank"]
