"""The time that `jlora.fit` and its checkpoints add to steps; steps in one dispatch."""

import functools
import itertools
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import optax

import jlora
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.training.transformers import (
    SUITE,
    Transformer,
    adapt_transformer,
    compare_loss,
    make_case,
    make_transformer,
    plain_loss,
)

FIT = "jlora fit"
BARE = "bare loop"
SAVED_OFTEN, SAVED_ONCE = "jlora fit, saved often", "jlora fit, saved at its end"
DISPATCHES = (10, 1)  # steps in one dispatch
_RATE = 1e-4
# A difference of 3 % needs many short rounds on a machine that does other work.
_LEAST_RUNS = 21
_DISPATCH_RUNS = 7  # more than 1, because the first run compiles
_SAVE_EVERY = 100  # steps, the default of `fit`


class Job(NamedTuple):
    """The arguments of a whole run; shared, so that each program compiles once."""

    model: Transformer
    loss: object  # lifted
    adapted: dict
    optimizer: optax.GradientTransformation
    batches: list  # one for each step, on the device


def make_fit_group(sizes, num_steps):
    """Return the group of `jlora.fit` and of a bare loop over the same steps."""
    fit = Contender(
        FIT,
        _prepare_fit,
        "jlora",
        "defaults, no progress bar",
        least_runs=_LEAST_RUNS,
    )
    bare = Contender(
        BARE,
        _prepare_bare,
        setting="jlora.init_train, then jlora.train_step; losses read at the end",
        least_runs=_LEAST_RUNS,
    )
    return _make_group("fit overhead", sizes, num_steps, (fit, bare))


def make_dispatch_group(sizes, num_steps):
    """Return the group of `jlora.fit` with ten steps in one dispatch, and with one."""
    contenders = [
        Contender(
            name_dispatch(steps),
            functools.partial(_prepare_fit, steps_per_dispatch=steps),
            "jlora",
            f"steps_per_dispatch={steps}, no progress bar",
            least_runs=_DISPATCH_RUNS,
        )
        for steps in DISPATCHES
    ]
    return _make_group("steps per dispatch", sizes, num_steps, tuple(contenders))


def make_checkpoint_group(sizes, num_steps):
    """Return the group of `jlora.fit` that saves every 100 steps, or at its end.

    Both open and close a folder, so that the difference is the saving beside steps.
    """
    contenders = [
        Contender(
            name,
            functools.partial(_prepare_saved, every=every),
            "jlora",
            f"checkpoint_every={every}, no progress bar",
            requires=("orbax",),
            least_runs=_LEAST_RUNS,
        )
        for name, every in ((SAVED_OFTEN, _SAVE_EVERY), (SAVED_ONCE, num_steps))
    ]
    return _make_group("fit with checkpoints", sizes, num_steps, tuple(contenders))


def name_dispatch(steps):
    """Return the name of the contender with so many steps in one dispatch."""
    return f"jlora fit, {steps} per dispatch"


def _make_group(operation, sizes, num_steps, contenders):
    return Group(
        SUITE,
        operation,
        make_case(sizes, f", {num_steps} steps"),
        lambda: (_make_job(sizes, num_steps),),
        contenders,
        _measure_losses,
        precision="default",
    )


def _make_job(sizes, num_steps):
    model = make_transformer(sizes)
    adapted = jax.device_put(adapt_transformer(model, trainable="v"))
    on_device = jax.block_until_ready(jax.device_put(model.batches))
    batches = list(itertools.islice(itertools.cycle(on_device), num_steps))
    return Job(model, jlora.lift(plain_loss), adapted, optax.adam(_RATE), batches)


def _prepare_fit(job, **options):
    def run():
        result = jlora.fit(
            job.loss, job.adapted, job.optimizer, job.batches, progress=False, **options
        )
        return jax.block_until_ready((result.losses, result.adapted))

    return Prepared(run, lambda result: result[0])


def _prepare_saved(job, every):
    def run():
        with tempfile.TemporaryDirectory() as folder:
            result = jlora.fit(
                job.loss,
                job.adapted,
                job.optimizer,
                job.batches,
                progress=False,
                checkpoint=folder,
                checkpoint_every=every,
            )
        return result.losses

    return Prepared(run, lambda losses: losses)


def _prepare_bare(job):
    def run():
        state, frozen = jlora.init_train(job.adapted, job.optimizer)
        losses = []
        for batch in job.batches:
            state, loss = jlora.train_step(
                job.loss, job.optimizer, state, frozen, batch
            )
            losses.append(loss)
        return jax.device_get(losses), jax.block_until_ready(state)

    return Prepared(run, lambda result: np.asarray(result[0]))


def _measure_losses(inputs, losses):
    (job,) = inputs
    return {
        "first loss difference": compare_loss(job.model, losses[0]),
        "steps": len(losses),
        # No exact value exists for it. It shows that all took the same steps.
        "last loss": losses[-1],
    }
