"""A tree of weights → a tree of adapted weights."""

from jlora.adaptation.adapted_weight import (
    AdaptedWeight,
    join,
    linear,
    merge,
    split_trainable,
)
from jlora.adaptation.adapters import extract_delta, get_factors, set_factors
from jlora.adaptation.batching import adapt
from jlora.adaptation.diagnostics import Diagnosis, diagnose
from jlora.adaptation.plan import Plan, PlanEntry, make_plan
from jlora.adaptation.rank_choice import RankBudget, RankRule
from jlora.adaptation.rule import Rule

__all__ = [
    "AdaptedWeight",
    "Diagnosis",
    "Plan",
    "PlanEntry",
    "RankBudget",
    "RankRule",
    "Rule",
    "adapt",
    "diagnose",
    "extract_delta",
    "get_factors",
    "join",
    "linear",
    "make_plan",
    "merge",
    "set_factors",
    "split_trainable",
]
