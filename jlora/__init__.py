"""Low-rank adaptation of large models in JAX.

Factorise a weight, A ≈ U V; train the factors; rebuild the weight, A' = U V.
"""

# An interrupt of the command during the imports ends it quietly.
import jlora._interrupt  # noqa: I001, F401

# Imported next: JAX's jitted functions walk the call stack when they are created, so
# importing JAX under our own frames takes 5 % longer.
import jax as _jax  # noqa: F401
import optax as _optax  # noqa: F401

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jlora import (  # noqa: F401
    factorization,
    quantization,
    rank_selection,
    reconstruction,
    updates,
)
from jlora.factorization import (
    adaptive_svd,
    estimate_error,
    low_rank_approximation,
    randomized_svd,
    truncated_svd,
)
from jlora.factors import SVD, Factors, split_svd
from jlora.rank_selection import allocate_ranks, choose_rank
from jlora.reconstruction import apply_factors, apply_many, reconstruct, stack_factors
from jlora.updates import concatenate_factors, recompress, set_columns

if _TYPE_CHECKING:
    from jlora import (  # noqa: F401
        adaptation,
        checkpoints,
        initializers,
        lifting,
        training,
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
    from jlora.checkpoints import load_arrays, load_peft, save_arrays, save_peft
    from jlora.lifting import lift, on_merged
    from jlora.training import fit, init_train, optimizers, train_step  # noqa: F401

# Modules that a program of kernels does not need are imported on their first use:
# with them the import of jlora takes a tenth longer than importing JAX and optax.
_ON_USE = {
    "adaptation": (
        "AdaptedWeight",
        "RankBudget",
        "RankRule",
        "Rule",
        "adapt",
        "diagnose",
        "join",
        "linear",
        "make_plan",
        "merge",
        "split_trainable",
    ),
    "checkpoints": ("load_arrays", "load_peft", "save_arrays", "save_peft"),
    "initializers": (),
    "lifting": ("lift", "on_merged"),
    "training": ("fit", "init_train", "optimizers", "train_step"),
}
_OWNERS = {name: package for package, names in _ON_USE.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _OWNERS and name not in _ON_USE:
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    package = _import_module(f"jlora.{_OWNERS.get(name, name)}")
    found = getattr(package, name) if name in _OWNERS else package
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWNERS, *_ON_USE})


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
    "load_peft",
    "low_rank_approximation",
    "make_plan",
    "merge",
    "on_merged",
    "randomized_svd",
    "recompress",
    "reconstruct",
    "save_arrays",
    "save_peft",
    "set_columns",
    "split_svd",
    "split_trainable",
    "stack_factors",
    "train_step",
    "truncated_svd",
]
