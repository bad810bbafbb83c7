"""jlora: low-rank adaptation of large models in JAX.

Take a weight apart into thin factors, A ≈ U V; learn a new domain by changing V; put the weight
together again, A' = U V.
"""

# Imported here first: each of JAX's jitted functions walks the stack when it is made, and under
# the frames of our own modules its import takes a twentieth longer.
import jax as _jax  # noqa: F401
import optax as _optax  # noqa: F401

from jlora.adaptation.adapters import mutated_to_delta, swap_factors, take_factors
from jlora.adaptation.batching import adapt
from jlora.adaptation.diagnostics import Diagnosis, diagnose
from jlora.adaptation.lifting import lift, on_merged
from jlora.adaptation.plan import Plan, PlanEntry, make_plan
from jlora.adaptation.quantization import quantize_int8, quantize_nf4
from jlora.adaptation.ranks import RankBudget, RankRule
from jlora.adaptation.rules import Rule
from jlora.adaptation.tree import AdaptedWeight, join, linear, merge, split_trainable
from jlora.checkpoints.arrays import load_arrays, save_arrays
from jlora.factorization.adaptive import AdaptiveSVD, adaptive_svd
from jlora.factorization.budget import allocate_ranks
from jlora.factorization.cross_validation import cross_validate_rank
from jlora.factorization.error import estimate_error, estimate_sketch_error
from jlora.factorization.gradient import low_rank_approximation
from jlora.factorization.rank import RankChoice, choose_rank
from jlora.factorization.svd import randomized_svd, truncated_svd
from jlora.factors import SVD, Factors, fix_signs, split_svd
from jlora.reconstruction.apply import apply_factors
from jlora.reconstruction.choice import which_implementation
from jlora.reconstruction.dense import reconstruct, unmerge
from jlora.reconstruction.many import apply_many, stack_factors
from jlora.reconstruction.rounding import CompensatedWeight
from jlora.training.evaluate import TrainingCost, evaluate_loss, measure_cost
from jlora.training.loop import FitResult, TrainState, fit, init_train, train_step
from jlora.updates.additive import add_low_rank, append_columns, append_rows
from jlora.updates.columns import remove_columns, replace_columns, set_columns
from jlora.updates.gradient_steps import project_away, scale_gradient, transport_moments
from jlora.updates.manifold import (
    IntegratedSVD,
    Tangent,
    integrate_low_rank,
    project_tangent,
    retract,
)
from jlora.updates.recompression import (
    balance,
    concatenate_factors,
    orthogonalize_product,
    recompress,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in the order of the rooms)
    "SVD", "Factors", "split_svd", "fix_signs",
    "randomized_svd", "truncated_svd", "adaptive_svd", "AdaptiveSVD", "low_rank_approximation",
    "estimate_error", "estimate_sketch_error",
    "choose_rank", "RankChoice", "allocate_ranks", "cross_validate_rank",
    "add_low_rank", "append_columns", "append_rows", "replace_columns", "remove_columns",
    "set_columns", "concatenate_factors", "recompress", "balance", "orthogonalize_product",
    "scale_gradient", "project_away", "transport_moments",
    "project_tangent", "Tangent", "retract", "integrate_low_rank", "IntegratedSVD",
    "reconstruct", "unmerge", "CompensatedWeight", "apply_factors", "apply_many", "stack_factors",
    "which_implementation",
    "Rule", "RankRule", "RankBudget", "Plan", "PlanEntry", "make_plan",
    "quantize_int8", "quantize_nf4",
    "AdaptedWeight", "adapt", "split_trainable", "join", "merge", "linear", "lift", "on_merged",
    "take_factors", "swap_factors", "mutated_to_delta", "diagnose", "Diagnosis",
    "fit", "FitResult", "TrainState", "init_train", "train_step",
    "evaluate_loss", "measure_cost", "TrainingCost",
    "load_arrays", "save_arrays",
]  # fmt: skip
