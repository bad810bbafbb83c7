"""A compiled step of training, and the figures that are read from it."""

import math
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.run.contenders import Prepared
from benchmarks.run.preparation import measure_memory
from benchmarks.suites.training.transformers import compare_loss

_FLOAT_BYTES = 4


class StepFigures(NamedTuple):
    """The first loss of a step, and its cost."""

    loss: float
    num_trained: int
    optimizer_bytes: int  # of its arrays; counters are left out
    flops: float = math.nan  # of the compiled program; NaN if unknown
    peak_bytes: float = math.nan


def prepare_step(step, trained, state, *rest):
    """Prepare a step that donates its state.

    Args:
        step: Compiled by `jax.jit`: (state, *rest) → (state, loss).
        trained: The tree of trained arrays; only their sizes are used.
        state: The first state.
    """
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
    rest = jax.block_until_ready(jax.device_put(rest))

    start = time.perf_counter()
    lowered = step.lower(state, *rest)
    lower_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_ms = 1e3 * (time.perf_counter() - start)

    def run():
        nonlocal state
        state, loss = jax.block_until_ready(compiled(state, *rest))
        return state, loss

    def fetch(result):
        state, loss = result
        return StepFigures(
            float(loss), num_trained, _count_optimizer_bytes(state), flops, peak_bytes
        )

    flops = (compiled.cost_analysis() or {}).get("flops", math.nan)
    peak_bytes, temporary_bytes = measure_memory(compiled)
    return Prepared(run, fetch, lower_ms, compile_ms, peak_bytes, temporary_bytes)


def _count_optimizer_bytes(state):
    """Return the bytes of the arrays of `state.opt_state`, without Adam's count."""
    leaves = jax.tree.leaves(state.opt_state)
    return sum(leaf.nbytes for leaf in leaves if np.ndim(leaf))


def measure_figures(inputs, figures):
    """Return {kind: value} of the figures that are known."""
    (model,) = inputs
    state_size = figures.optimizer_bytes / (_FLOAT_BYTES * figures.num_trained)
    found = {
        "first loss difference": compare_loss(model, figures.loss),
        "flops": figures.flops,
        "peak bytes": figures.peak_bytes,
        "trained parameters": figures.num_trained,
        "optimizer state over trained parameters": state_size,
    }
    return {
        kind: value
        for kind, value in found.items()
        if value is not None and not math.isnan(value)
    }
