"""The training loop: `fit`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._progress import Progress, report
from jlora._types import DTypeLike, PRNGKey, Tree
from jlora.adaptation.weight_trees import split_trainable
from jlora.training.batches import BatchFeed
from jlora.training.fit_checks import check_fit, check_fit_options
from jlora.training.fit_result import FitResult
from jlora.training.monitor import Callback, Evaluate, MetricsFile, Monitor
from jlora.training.run_checkpoints import RunCheckpoints, describe_job
from jlora.training.runs import Run
from jlora.training.step_programs import (
    Loss,
    StepOptions,
    cast_floating,
    compile_step,
    compile_steps,
)
from jlora.training.steps import init_train


def fit(
    loss: Loss,
    adapted: Tree,
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    *,
    num_steps: int | None = None,
    also_train: str | None = None,
    opt_state: Any | None = None,
    key: PRNGKey | None = None,
    has_aux: bool = False,
    accumulate_steps: int = 1,
    steps_per_dispatch: int = 1,
    compute_dtype: DTypeLike | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 100,
    patience: int | None = None,
    callback: Callback | None = None,
    metrics_file: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    num_checkpoints: int = 2,
    progress: bool | None = None,
    log_every: int = 100,
) -> FitResult:
    """Return the adapted tree with its trainable arrays trained by an optax optimiser.

    It takes one step per batch. Frozen leaves keep their bits and have neither gradient
    nor optimiser state. If the loss or a trained array becomes NaN or Inf, training
    stops, reports it on stderr and in `stop_reason`, and returns the factors at the
    last finite loss.

    A loss that multiplies with `batch @ params["w"]` or `jlora.linear` works directly.
    Wrap any other loss in `jlora.lift(loss)`, which never forms the weights, or in
    `jlora.on_merged(loss)`, which forms them in each step.

    Args:
        loss: loss(params, batch) -> scalar, of the adapted tree; with `key` it is
            loss(params, batch, key), with `has_aux` it returns (scalar, metrics). Pass
            the same function object in several calls: the compiled step is reused.
        adapted: tree from `adapt`; its arrays are not donated.
        optimizer: any optax.GradientTransformation, or one of `jlora.optimizers`. Those
            with extra arguments receive `value`, `grad`, `value_fn` and `frozen`, see
            `train_step`.
        batches: iterable of pytrees of arrays of one structure; consumed up to
            num_steps. The next one is sent to the device while a step runs.
        num_steps: most steps to take, ≥ 1. None: as many as there are batches.
        also_train: as in `split_trainable`.
        opt_state: `FitResult.opt_state` of an earlier call on the tree that it
            returned: both runs together are then one run. None: a new state.
        key: one typed PRNG key, consumed; each step's loss gets it folded with the
            number of the step, for dropout. None: the loss takes no key.
        has_aux: whether the loss returns metrics, a pytree of arrays.
        accumulate_steps: batches whose gradients are averaged for one update, by
            `optax.MultiSteps`. 1: one batch each.
        steps_per_dispatch: steps in one call of the device, by `jax.lax.scan`. More
            than 1 helps where a step takes less than a millisecond.
        compute_dtype: of the floating arrays of `adapted` inside the loss, such as
            jnp.bfloat16; trained arrays and optimiser keep their own. None: their own.
        evaluate: function of the adapted tree that returns a number, lower is better,
            or {name: number}, of which the first decides. It must not keep the tree.
            None: none.
        evaluate_every: steps between two evaluations.
        patience: evaluations without a better value before training ends. None: never.
        callback: callback(step, {name: float}), called with the loss and the metrics
            when they are looked at, and with each evaluation. None: none.
        metrics_file: file for one line of JSON for each step and evaluation; a resumed
            run goes on with it. None: none.
        checkpoint: folder for checkpoints by orbax (`jlora[train]`): trained arrays,
            optimiser, step, place in the data. The same call made again goes on from
            the newest one, with the same bits on a CPU. Batches that were read are
            skipped, or an iterator with `set_state` (Grain) is set. None: none.
        checkpoint_every: batches between two checkpoints.
        num_checkpoints: how many of the newest ones are kept.
        progress: None: a bar on a terminal, plain lines elsewhere. False: neither.
        log_every: most steps between two looks at the loss; a bar looks twice a second.
            After a loss that is not finite so many batches may still be read.

    Returns:
        `FitResult`; `adapted` holds the last factors, `best` those of the lowest
        evaluation.

    Raises:
        ImportError: `checkpoint` without orbax-checkpoint.
        OSError: a file or checkpoint cannot be written.
        TypeError: arguments of the wrong kind, or a loss that is no scalar.
        ValueError: nothing to train, no batch, batches of several structures, an
            `opt_state` or a `checkpoint` of another run.
        Any exception of `batches`, `evaluate`, `callback` or of an interrupt, with the
            `FitResult` so far in its attribute `fit_result`; with `checkpoint` it is
            saved there too.

    Cost: a step is one value and gradient; the trained leaves are held twice.

    Gradients: not differentiable.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> batches = [(jnp.eye(4), jnp.ones((4, 3)))] * 50
        >>> result = jlora.fit(loss, adapted, optax.adam(0.1), batches, progress=False)
        >>> bool(result.losses[-1] < result.losses[0]), result.stop_reason
        (True, None)
    """
    check_fit(loss, adapted, optimizer, batches)
    counts = check_fit_options(
        key=key,
        evaluate=evaluate,
        callback=callback,
        num_steps=num_steps,
        accumulate_steps=accumulate_steps,
        steps_per_dispatch=steps_per_dispatch,
        evaluate_every=evaluate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        num_checkpoints=num_checkpoints,
        log_every=log_every,
    )
    if accumulate_steps > 1:
        optimizer = _accumulate(optimizer, counts["accumulate_steps"])
    state, frozen = init_train(
        adapted, optimizer, also_train=also_train, opt_state=opt_state
    )
    dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
    checkpoints = None
    if checkpoint is not None:
        job = describe_job(state, frozen, key, compute_dtype=str(dtype))
        checkpoints = RunCheckpoints(
            checkpoint, counts["checkpoint_every"], counts["num_checkpoints"], job
        )

    total = counts["num_steps"] or _length(batches)
    bar = Progress("fit", total, enabled=progress, every=counts["log_every"])
    options = StepOptions(has_aux, dtype)
    run = Run(
        state,
        frozen,
        frozen if dtype is None else cast_floating(frozen, dtype),
        key,
        (
            compile_step(loss, optimizer, options),
            compile_steps(loss, optimizer, options),
        ),
        BatchFeed(batches, counts["steps_per_dispatch"], counts["num_steps"]),
        Monitor(evaluate, counts["evaluate_every"], counts["patience"]),
        checkpoints,
        callback,
        functools.partial(MetricsFile, metrics_file),
        bar,
    )
    result = run.finish()
    _report_no_move(result, adapted, also_train, run)
    return result


@functools.lru_cache(maxsize=16)
def _accumulate(
    optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """Return the optimiser that updates once in so many steps; one object each."""
    return optax.MultiSteps(optimizer, every_k_schedule=steps).gradient_transformation()


def _report_no_move(
    result: FitResult, adapted: Tree, also_train: str | None, run: Run
) -> None:
    """Say so if training changed nothing."""
    before, _ = split_trainable(adapted, also_train=also_train)
    pairs = zip(*map(jax.tree.leaves, (before, run.state.trainable)), strict=True)
    has_moved = not all(bool(jnp.array_equal(old, new)) for old, new in pairs)
    if result.stop_reason is None and not has_moved:
        report(
            f"fit: no trained array changed in {len(result.losses)} steps. Check the "
            "loss, and whether the optimiser waits for more steps."
        )


def _length(batches: Any) -> int | None:
    return len(batches) if hasattr(batches, "__len__") else None
