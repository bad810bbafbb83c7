"""Loss + batches → trained factors."""

from jlora.training.evaluation import TrainingCost, evaluate_loss, measure_cost
from jlora.training.gradient_steps import (
    precondition_gradient,
    project_gradient_out,
    transport_moments,
)
from jlora.training.loop import FitResult, TrainState, fit, init_train, train_step
from jlora.training.riemannian import (
    IntegratedSVD,
    Tangent,
    integrate_low_rank,
    project_tangent,
    retract,
)

__all__ = [
    "FitResult",
    "IntegratedSVD",
    "Tangent",
    "TrainState",
    "TrainingCost",
    "evaluate_loss",
    "fit",
    "init_train",
    "integrate_low_rank",
    "measure_cost",
    "precondition_gradient",
    "project_gradient_out",
    "project_tangent",
    "retract",
    "train_step",
    "transport_moments",
]
