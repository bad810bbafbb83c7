"""Ranks and learning rates by held-out error: all together, and one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks.run.cases import WholeCase
from benchmarks.run.contenders import Contender, Group, Prepared
from benchmarks.suites.training.transformers import SUITE
from jlora.training.folds import assign_folds, draw_batches

TOGETHER = "jlora cross_validate"
ONE_BY_ONE = "jlora fit, one by one"
RANKS, RATES, FOLDS = (2, 4, 8, 16), (1e-3, 3e-3, 1e-2), 3
_LAYERS, _OUTPUTS, _EXAMPLES, _BATCH = 4, 16, 600, 32
_KEY = 3


def make_trial_group(size, num_steps):
    """Return the group of 4 ranks × 3 rates × 3 folds of a small network.

    Both compile anew in each run, as the first call of a user does.
    """
    together = Contender(
        TOGETHER,
        lambda *inputs: _prepare(_run_together, num_steps, *inputs),
        "jlora",
        "init lora, Adam, batches of 32; compiles included",
        least_runs=3,
    )
    one_by_one = Contender(
        ONE_BY_ONE,
        lambda *inputs: _prepare(_run_one_by_one, num_steps, *inputs),
        setting="adapt for each rank, fit for each candidate; compiles included",
        least_runs=3,
    )
    return Group(
        SUITE,
        "cross-validation",
        WholeCase(
            f"4 ranks, 3 rates, 3 folds, {_LAYERS} layers of {size}×{size}, "
            f"{num_steps} steps"
        ),
        lambda: _make_problem(size),
        (together, one_by_one),
        _measure_errors,
        precision="default",
    )


def _make_problem(size):
    """Return (weights, x, y) of a network with tanh between its layers."""
    rng = np.random.default_rng(0)
    shapes = {f"layers/{i}": (size, size) for i in range(_LAYERS)}
    shapes["out"] = (size, _OUTPUTS)
    params = {
        name: rng.standard_normal(shape, np.float32) / np.float32(size**0.5)
        for name, shape in shapes.items()
    }
    x = rng.standard_normal((_EXAMPLES, size), np.float32)
    return params, x, np.sin(2 * x[:, :_OUTPUTS])


def _loss(params, batch):
    x, y = batch
    for i in range(_LAYERS):
        x = jnp.tanh(x @ params[f"layers/{i}"])
    return jnp.mean((x @ params["out"] - y) ** 2)


def _prepare(run, num_steps, params, x, y):
    def start():
        jax.clear_caches()
        return run(num_steps, params, x, y)

    return Prepared(start, lambda errors: errors)


def _make_rule(rank):
    return jlora.Rule("layers", rank, init="lora", trainable="uv")


def _run_together(num_steps, params, x, y):
    trials = jlora.training.cross_validate(
        _loss,
        params,
        _make_rule(1),
        (x, y),
        ranks=RANKS,
        rates=RATES,
        folds=FOLDS,
        num_steps=num_steps,
        batch_size=_BATCH,
        key=jax.random.key(_KEY),
        progress=False,
    )
    return trials.errors


def _run_one_by_one(num_steps, params, x, y):
    # The same folds, batches and first factors.
    fold_key, batch_key, adapt_key, _ = jax.random.split(jax.random.key(_KEY), 4)
    held_out = assign_folds(len(x), FOLDS, fold_key)
    order = draw_batches(held_out, _BATCH, num_steps, batch_key)

    errors = np.zeros((len(RANKS), len(RATES), FOLDS))
    for i, rank in enumerate(RANKS):
        plan = jlora.make_plan(params, _make_rule(rank))
        adapted = jlora.adapt(params, plan, key=adapt_key, progress=False)
        for j, rate in enumerate(RATES):
            optimizer = optax.adam(rate)
            for fold in range(FOLDS):
                batches = ((x[each], y[each]) for each in order[fold])
                result = jlora.fit(_loss, adapted, optimizer, batches, progress=False)
                own = (x[held_out[fold]], y[held_out[fold]])
                errors[i, j, fold] = jlora.training.evaluate_loss(
                    _loss, result.adapted, [own]
                )
    return errors


def _measure_errors(inputs, errors):
    # No exact value exists for it. It shows that both trained the same candidates.
    return {"smallest mean error": float(errors.mean(axis=-1).min())}
