"""Training: one step of several methods, and the loop of `jlora.fit` around it.

transformers     the model to train, its batches, its adapted trees
step_programs    a compiled step, and the figures that are read from it
step_methods     a step of V only, U and V, some columns, everything
torch_steps      the same step by peft and torch
rank_trials      all candidates of a cross-validation, together and one by one
fit_loops        jlora.fit beside a bare loop; its checkpoints; steps of one dispatch
"""

from benchmarks.suites.training.fit_loops import (
    make_checkpoint_group,
    make_dispatch_group,
    make_fit_group,
)
from benchmarks.suites.training.rank_trials import make_trial_group
from benchmarks.suites.training.step_methods import make_step_group
from benchmarks.suites.training.transformers import Sizes

# One step of the first takes about 5 ms on two cores, of the second about 0.2 ms.
_FEW_MS = Sizes(hidden=128, layers=1, tokens=256, rank=8)
_TINY = Sizes(hidden=16, layers=1, tokens=8, rank=2)


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    if level_name == "quick":
        return [
            make_step_group(Sizes(hidden=128, layers=2, tokens=64, rank=16)),
            make_fit_group(_FEW_MS, num_steps=40),
            make_checkpoint_group(_FEW_MS, num_steps=200),
            make_dispatch_group(_TINY, num_steps=200),
            make_trial_group(size=32, num_steps=50),
        ]
    return [
        make_step_group(Sizes(hidden=512, layers=4, tokens=512, rank=16)),
        make_fit_group(_FEW_MS, num_steps=100),
        make_checkpoint_group(_FEW_MS, num_steps=500),
        make_dispatch_group(_TINY, num_steps=1000),
        make_trial_group(size=128, num_steps=200),
    ]
