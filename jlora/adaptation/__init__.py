"""A tree of weights → a tree of adapted weights.

rule.py, rank_rules.py   Rule, RankRule, RankBudget: the wishes
plan.py, rank_choice.py  make_plan: which weights, with ranks as numbers
plan_tables.py           a plan as text
batching.py              adapt; its work: tasks.py, programs.py, chunks.py,
                         weight_builder.py, and traced.py inside a trace
mesh_groups.py           weights on a mesh: placements.py, dealing.py; their cost:
                         mesh_plans.py, costs.py
adapted_weight.py        AdaptedWeight, linear, read_base
lazy_arrays.py           LazyArray: weights that stay in their file
weight_trees.py          split_trainable, join
merging.py               merge
requantization.py        measure_delta_loss: merging into a quantised base
adapters.py              get_factors, set_factors, extract_delta
diagnostics.py           diagnose
paths.py, data.py, tables.py   helpers
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jlora.adaptation.adapted_weight import AdaptedWeight, linear, read_base
from jlora.adaptation.adapters import extract_delta, get_factors, set_factors
from jlora.adaptation.batching import adapt
from jlora.adaptation.costs import DeviceRates
from jlora.adaptation.lazy_arrays import LazyArray
from jlora.adaptation.merging import merge
from jlora.adaptation.plan import Plan, PlanEntry, make_plan
from jlora.adaptation.rank_rules import RankBudget, RankRule
from jlora.adaptation.rule import Rule
from jlora.adaptation.weight_trees import join, split_trainable

if _TYPE_CHECKING:
    from jlora.adaptation.diagnostics import Diagnosis, diagnose
    from jlora.adaptation.requantization import DeltaLoss, measure_delta_loss

# Imported on use, as the packages of jlora's own __init__ are.
_ON_USE = {
    "DeltaLoss": "requantization",
    "Diagnosis": "diagnostics",
    "diagnose": "diagnostics",
    "measure_delta_loss": "requantization",
}


def __getattr__(name: str) -> object:
    if name not in _ON_USE:
        raise AttributeError(f"module 'jlora.adaptation' has no attribute {name!r}")
    return getattr(_import_module(f"jlora.adaptation.{_ON_USE[name]}"), name)


__all__ = [
    "AdaptedWeight",
    "DeltaLoss",
    "DeviceRates",
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
    "measure_delta_loss",
    "merge",
    "read_base",
    "set_factors",
    "split_trainable",
]
