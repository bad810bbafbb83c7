"""A tree of weights → a tree of adapted weights.

rule.py, rank_rules.py   Rule, RankRule, RankBudget: the wishes
plan.py, rank_choice.py  make_plan: which weights, with ranks as numbers
batching.py              adapt; its work: tasks.py, programs.py, chunks.py,
                         weight_builder.py, and traced.py inside a trace
adapted_weight.py        AdaptedWeight, linear, read_base
lazy_arrays.py           LazyArray: weights that stay in their file
weight_trees.py          split_trainable, join
merging.py               merge
adapters.py              get_factors, set_factors, extract_delta
diagnostics.py           diagnose
paths.py, data.py, tables.py   helpers
"""

from jlora.adaptation.adapted_weight import AdaptedWeight, linear, read_base
from jlora.adaptation.adapters import extract_delta, get_factors, set_factors
from jlora.adaptation.batching import adapt
from jlora.adaptation.diagnostics import Diagnosis, diagnose
from jlora.adaptation.lazy_arrays import LazyArray
from jlora.adaptation.merging import merge
from jlora.adaptation.plan import Plan, PlanEntry, make_plan
from jlora.adaptation.rank_rules import RankBudget, RankRule
from jlora.adaptation.rule import Rule
from jlora.adaptation.weight_trees import join, split_trainable

__all__ = [
    "AdaptedWeight",
    "Diagnosis",
    "LazyArray",
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
    "read_base",
    "set_factors",
    "split_trainable",
]
