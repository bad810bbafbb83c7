"""Loss + batches → trained factors.

loop.py             fit; runs.py, batches.py, monitor.py, run_checkpoints.py: its parts
steps.py            init_train, train_step; step_programs.py: what is compiled
evaluation.py       evaluate_loss, measure_cost
comparison.py       evaluate: accuracy, forgetting and cost of several models
step_cost.py        measure_step: time, memory and flops of a step
cross_validation.py cross_validate: ranks and rates by held-out error
optimizers/         optax transformations for factors (also `jlora.optimizers`)
gradient_steps.py   the pure functions behind them: precondition_gradient, ...
riemannian.py       tangent projection, retraction, integration at fixed rank
"""

from jlora.training import optimizers  # noqa: F401
from jlora.training.comparison import evaluate
from jlora.training.cross_validation import cross_validate
from jlora.training.evaluation import TrainingCost, evaluate_loss, measure_cost
from jlora.training.evaluation_table import Evaluation
from jlora.training.fit_result import FitResult
from jlora.training.gradient_steps import (
    precondition_gradient,
    project_gradient_out,
    transport_moments,
)
from jlora.training.loop import fit
from jlora.training.monitor import StepEvaluation
from jlora.training.rank_trials import RankTrials
from jlora.training.riemannian import (
    IntegratedSVD,
    Tangent,
    integrate_low_rank,
    project_tangent,
    retract,
)
from jlora.training.step_cost import StepCost, measure_step
from jlora.training.step_programs import TrainState
from jlora.training.steps import init_train, train_step

__all__ = [
    "Evaluation",
    "FitResult",
    "IntegratedSVD",
    "RankTrials",
    "StepCost",
    "StepEvaluation",
    "Tangent",
    "TrainState",
    "TrainingCost",
    "cross_validate",
    "evaluate",
    "evaluate_loss",
    "fit",
    "init_train",
    "integrate_low_rank",
    "measure_cost",
    "measure_step",
    "precondition_gradient",
    "project_gradient_out",
    "project_tangent",
    "retract",
    "train_step",
    "transport_moments",
]
