"""One step of Adam on a transformer: V only, U and V, some columns, everything."""

import functools
from typing import NamedTuple

import jax
import optax

import jlora
from benchmarks.run.contenders import Contender, Group
from benchmarks.suites.training.step_programs import measure_figures, prepare_step
from benchmarks.suites.training.torch_steps import prepare_peft_step
from benchmarks.suites.training.transformers import (
    SUITE,
    adapt_transformer,
    make_case,
    make_transformer,
    plain_loss,
)
from jlora.training.step_programs import StepOptions, compile_step

V_ONLY = "jlora V only"
U_AND_V = "jlora U and V"
COLUMNS = "jlora last 8 columns of V"
FULL = "full fine-tuning"
PEFT = "peft, torch"
RATE = 1e-4
_RULES = {
    V_ONLY: {"trainable": "v"},
    U_AND_V: {"trainable": "uv"},
    COLUMNS: {"trainable": "v", "num_columns": 8},
}
_LEAST_RUNS = 7  # the ratios need common rounds


class _PlainState(NamedTuple):
    """The state of a step on plain weights."""

    params: dict
    opt_state: tuple


def make_step_group(sizes):
    """Return the group of one step of each method."""
    ours = [
        Contender(
            name,
            functools.partial(_prepare_adapted, rule),
            "jlora",
            "jlora.train_step of jlora.lift(loss), LoRA factors, optax.adam",
            least_runs=_LEAST_RUNS,
        )
        for name, rule in _RULES.items()
    ]
    full = Contender(
        FULL,
        _prepare_full,
        setting="jax.value_and_grad of the plain loss, optax.adam, donated",
        least_runs=_LEAST_RUNS,
    )
    peft = Contender(
        PEFT,
        functools.partial(prepare_peft_step, RATE),
        setting="LoRA of all linear layers, alpha = rank, torch.optim.Adam",
        requires=("torch", "peft"),
        least_runs=_LEAST_RUNS,
    )
    return Group(
        SUITE,
        "training step",
        make_case(sizes),
        lambda: (make_transformer(sizes),),
        (*ours, full, peft),
        measure_figures,
        precision="default",
    )


def _prepare_adapted(rule, model):
    optimizer = optax.adam(RATE)
    adapted = adapt_transformer(model, **rule)
    state, frozen = jlora.init_train(adapted, optimizer)
    # jlora.train_step runs this program, but returns nothing to analyse.
    program = compile_step(jlora.lift(plain_loss), optimizer, StepOptions())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, batch):
        state, (loss, _) = program(state, frozen, batch, None)
        return state, loss

    return prepare_step(step, state.trainable, state, frozen, model.batches[0])


def _prepare_full(model):
    optimizer = optax.adam(RATE)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        loss, gradient = jax.value_and_grad(plain_loss)(state.params, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return _PlainState(params, opt_state), loss

    params = jax.device_put(model.weights)
    # A NumPy array may share its memory with the device's; what is donated may not.
    params = jax.tree.map(jax.numpy.copy, params)
    state = _PlainState(params, optimizer.init(params))
    return prepare_step(step, model.weights, state, model.batches[0])
