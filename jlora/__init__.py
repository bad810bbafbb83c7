"""Low-rank adaptation of large models in JAX.

Factorise a weight, A ≈ U V; train the factors; rebuild the weight, A' = U V.
"""

# An interrupt of the command during the imports ends it quietly.
import jlora._interrupt  # noqa: I001, F401

# Imported next: JAX's jitted functions walk the call stack when they are created, so
# importing JAX under our own frames takes 5 % longer.
import jax as _jax  # noqa: F401
import optax as _optax  # noqa: F401

from jlora import (  # noqa: F401
    adaptation,
    checkpoints,
    factorization,
    initializers,
    lifting,
    quantization,
    rank_selection,
    reconstruction,
    training,
    updates,
)
from jlora.adaptation import (
    AdaptedWeight,
    RankBudget,
    RankRule,
    Rule,
    adapt,
    diagnose,
    join,
    linear,
    make_plan,
    merge,
    split_trainable,
)
from jlora.checkpoints import load_arrays, save_arrays
from jlora.factorization import (
    adaptive_svd,
    estimate_error,
    low_rank_approximation,
    randomized_svd,
    truncated_svd,
)
from jlora.factors import SVD, Factors, split_svd
from jlora.lifting import lift, on_merged
from jlora.rank_selection import allocate_ranks, choose_rank
from jlora.reconstruction import apply_factors, apply_many, reconstruct, stack_factors
from jlora.training import fit, init_train, optimizers, train_step  # noqa: F401
from jlora.updates import concatenate_factors, recompress, set_columns

__version__ = "0.1.0"

__all__ = [
    "SVD",
    "AdaptedWeight",
    "Factors",
    "RankBudget",
    "RankRule",
    "Rule",
    "adapt",
    "adaptive_svd",
    "allocate_ranks",
    "apply_factors",
    "apply_many",
    "choose_rank",
    "concatenate_factors",
    "diagnose",
    "estimate_error",
    "fit",
    "init_train",
    "join",
    "lift",
    "linear",
    "load_arrays",
    "low_rank_approximation",
    "make_plan",
    "merge",
    "on_merged",
    "randomized_svd",
    "recompress",
    "reconstruct",
    "save_arrays",
    "set_columns",
    "split_svd",
    "split_trainable",
    "stack_factors",
    "train_step",
    "truncated_svd",
]
