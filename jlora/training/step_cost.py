"""The cost of a training step: time, memory, arithmetic."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora import _checks
from jlora._types import Tree
from jlora.training.batches import to_arrays
from jlora.training.evaluation import measure_cost
from jlora.training.fit_checks import check_fit
from jlora.training.steps import Loss, init_train, train_step


class StepCost(NamedTuple):
    """Cost of a training step, from `measure_step`; None where a backend is silent.

    Example:
        >>> import jlora
        >>> jlora.training.StepCost(12, 96, 0.4, 2000, 500, 1e6).step_ms
        0.4
    """

    num_trained: int  # trained elements
    optimizer_bytes: int  # bytes of the optimiser's state
    step_ms: float | None  # median time of a step
    peak_bytes: int | None  # arguments, results and temporary arrays of a step
    temporary_bytes: int | None  # activations, gradients and work space of a step
    num_flops: float | None  # of a step, as XLA counts them


def measure_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    adapted: Tree,
    batch: Any,
    *,
    also_train: str | None = None,
    repetitions: int = 10,
) -> StepCost:
    """Return the `StepCost` of a training step: time, memory and flops.

    The step is compiled for the shapes of the batch, with its state donated as in
    `fit`. Memory and flops are the compiler's numbers for this program, so they are
    the same in every run. The time is measured, after one step to warm up.

    Args:
        loss: loss(params, batch) -> scalar, as for `fit`.
        optimizer: any optax.GradientTransformation.
        adapted: tree from `adapt`; for full fine-tuning any tree with
            also_train=".*".
        batch: pytree of arrays.
        also_train: as in `split_trainable`.
        repetitions: static, steps that are timed, ≥ 1.

    Returns:
        `StepCost`.

    Raises:
        TypeError, ValueError: as `fit`.

    Cost: one compilation, and repetitions + 1 steps. The given tree is unchanged.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((64, 32))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 4))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> def loss(params, x):
        ...     return jnp.mean((x @ params["w"]) ** 2)
        >>> x = jnp.ones((8, 64))
        >>> cost = jlora.training.measure_step(loss, optax.adam(0.1), adapted, x)
        >>> cost.num_trained, cost.optimizer_bytes  # two moments and a counter
        (128, 1028)
    """
    check_fit(loss, adapted, optimizer, [batch])
    repetitions = _checks.check_integer(repetitions, "repetitions")
    batch = jax.tree.map(jnp.asarray, to_arrays(batch))
    state, frozen = init_train(adapted, optimizer, also_train=also_train)
    size = measure_cost(state)

    step = functools.partial(train_step, loss, optimizer)
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    peak_bytes, temporary_bytes = read_memory(compiled)

    # The state is donated: each step takes the result of the one before.
    times = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))
        times.append(1e3 * (time.perf_counter() - start))
    step_ms = statistics.median(times[1:])
    flops = _read_flops(compiled)
    return StepCost(*size, step_ms, peak_bytes, temporary_bytes, flops)


def read_memory(compiled: Any) -> tuple[int | None, int | None]:
    """Return (peak, temporary) bytes of a compiled program, None if it does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None, None
    arguments = found.argument_size_in_bytes - found.alias_size_in_bytes
    temporary = found.temp_size_in_bytes
    return arguments + found.output_size_in_bytes + temporary, temporary


def _read_flops(compiled: Any) -> float | None:
    analysis = compiled.cost_analysis() or {}
    return analysis.get("flops")
