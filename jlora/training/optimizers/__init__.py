"""Optax transformations that know about factors; also reachable as `jlora.optimizers`.

All are `optax.GradientTransformationExtraArgs` and work in `optax.chain`, in
`jlora.fit` and in `jlora.train_step`, which passes them the frozen factors.

    factor_gram.py     scale_by_factor_gram: ScaledGD, for u, v or both
    decay.py           add_decayed_delta: weight decay towards the start of training
    protection.py      project_out: keep a subspace of inputs or outputs untouched
    learning_rates.py  lora_plus: a larger learning rate for v
    low_rank_adam.py   scale_by_low_rank_adam: Adam on projected gradients
    partition.py       by_path: another optimiser for some of the arrays
    riemannian.py      riemannian_sgd, riemannian_muon: steps along a fixed rank
    weights.py         map_weights: to write your own
"""

from jlora.training.optimizers.decay import add_decayed_delta
from jlora.training.optimizers.factor_gram import scale_by_factor_gram
from jlora.training.optimizers.learning_rates import lora_plus
from jlora.training.optimizers.low_rank_adam import scale_by_low_rank_adam
from jlora.training.optimizers.partition import by_path
from jlora.training.optimizers.protection import project_out
from jlora.training.optimizers.riemannian import riemannian_muon, riemannian_sgd
from jlora.training.optimizers.weights import map_weights

__all__ = [
    "add_decayed_delta",
    "by_path",
    "lora_plus",
    "map_weights",
    "project_out",
    "riemannian_muon",
    "riemannian_sgd",
    "scale_by_factor_gram",
    "scale_by_low_rank_adam",
]
