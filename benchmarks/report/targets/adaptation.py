"""Targets of adaptation: whole models initialised, and steps of training (part 6)."""

from benchmarks.report.targets.measures import measure_error, measure_ratio
from benchmarks.report.targets.target import Target

_STEP = (
    "adaptation",
    "lifted training step",
    "Llama-shaped, hidden 2048, 2 layers, 256 tokens",
)
_STEP_BOUNDS = {"hand-written apply_factors": 1.05, "qwix": 1.0, "flax nnx": 1.0}


def _list_whole_model(rank):
    """Return the targets of the initialisation of a whole model."""
    case = f"Llama-shaped, hidden 2048, 8 layers, 56 matrices, rank {rank}, float32"
    problem = ("adaptation", "pissa initialisation", case)
    ours = (*problem, "jlora adapt")
    warm = measure_ratio(problem, "jlora adapt", "peft pissa_niter_16")
    cold = measure_ratio(problem, "jlora adapt, cold", "peft pissa_niter_16")
    over_exact = measure_ratio(problem, "jlora adapt", "peft pissa")

    name = f"whole model, rank {rank}"
    memory = f"{name}, resident memory above the weights, GiB"
    targets = [
        Target(6, f"{name}, warm, over peft niter 16", 0.4, warm),
        Target(6, f"{name}, cold, over peft niter 16", 1.2, cold),
        Target(6, f"{name}, over peft exact", 1 / 15, over_exact),
        Target(6, f"{name}, excess error, worst layer", 1e-4, measure_error(ours)),
        Target(6, memory, 1.5, measure_error(ours, "extra GiB")),
    ]
    for kind in ("weights changed by repeating", "weights changed by another layer"):
        targets.append(Target(6, f"{name}, {kind}", 0, measure_error(ours, kind)))
    return targets


def _make_training_step(peer, bound):
    name = f"training step through lift over {peer}"
    return Target(6, name, bound, measure_ratio(_STEP, "jlora lift", peer))


TARGETS = (
    *_list_whole_model(16),
    *_list_whole_model(64),
    *(_make_training_step(peer, bound) for peer, bound in _STEP_BOUNDS.items()),
)
