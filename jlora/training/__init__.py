"""Loss + batches → trained factors.

loop.py             fit; runs.py, batches.py, monitor.py, run_checkpoints.py: its parts
steps.py            init_train, train_step; step_programs.py: what is compiled
evaluation.py       evaluate_loss, measure_cost
optimizers/         optax transformations for factors (also `jlora.optimizers`)
gradient_steps.py   the pure functions behind them: precondition_gradient, ...
riemannian.py       tangent projection, retraction, integration at fixed rank
"""

from jlora.training import optimizers  # noqa: F401
from jlora.training.evaluation import TrainingCost, evaluate_loss, measure_cost
from jlora.training.fit_result import FitResult
from jlora.training.gradient_steps import (
    precondition_gradient,
    project_gradient_out,
    transport_moments,
)
from jlora.training.loop import fit
from jlora.training.monitor import StepEvaluation
from jlora.training.riemannian import (
    IntegratedSVD,
    Tangent,
    integrate_low_rank,
    project_tangent,
    retract,
)
from jlora.training.step_programs import TrainState
from jlora.training.steps import init_train, train_step

__all__ = [
    "StepEvaluation",
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
