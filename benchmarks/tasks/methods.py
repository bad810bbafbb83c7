"""The ways to adapt a model that are compared, from a few columns to all weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import jlora
from benchmarks.tasks.task import Task

NONE, V_ONLY, LORA, FULL = "no adaptation", "V only", "LoRA", "full fine-tuning"
# Names of methods on a quantised base end so.
_NF4 = "(NF4)"
NONE_QUANTIZED, QLORA = f"{NONE} {_NF4}", f"QLoRA {_NF4}"
# Of v over u. LoRA+ reports 16 for large models, our demo's best is 4.
PLUS_RATIO = 4.0


class Method(NamedTuple):
    """One way to adapt a model."""

    name: str
    rule: dict[str, Any] | None  # of `jlora.Rule`; None: whole weights are trained
    # First guess for the learning rate, as a multiple of the one of full fine-tuning.
    rate_factor: float = 1.0
    # Gradient transformation before the learning rate.
    precondition: Callable[[], optax.GradientTransformation] = optax.scale_by_adam
    is_scaled_gd: bool = False  # its first guess is the task's `scaled_rate`
    needs_moments: bool = False  # only for tasks with `measure_moments`


def list_methods(num_columns: int) -> tuple[Method, ...]:
    """Return the methods of the table, in its order.

    Args:
        num_columns: of v that "last columns" trains.
    """
    both = {"trainable": "uv"}
    v_only = {"trainable": "v"}
    last = {**v_only, "num_columns": num_columns}
    return (
        Method(V_ONLY, {"init": "pissa", **v_only}, 5.0),
        Method("V only, random U", {"init": "lora", **v_only}, 10.0),
        Method("last columns of V", {"init": "pissa", **last}, 8.0),
        Method(LORA, {"init": "lora", **both}, 8.0),
        Method("PiSSA", {"init": "pissa", **both}, 2.0),
        Method("MiLoRA", {"init": "milora", **both}, 8.0),
        Method("LoRA+", {"init": "lora", **both}, 4.0, _adam_plus),
        Method("ScaledGD", {"init": "pissa", **both}, 1.0, _scaled_momentum, True),
        Method("core", {"init": "lora_xs", "trainable": "core"}, 10.0),
        Method(FULL, None, 1.0),
    )


def list_quantized_methods() -> tuple[Method, ...]:
    """Return the methods on a base in NF4; they train as many numbers as "LoRA"."""
    both = {"trainable": "uv", "quantize": jlora.quantization.nf4()}
    loftq = jlora.initializers.loftq(num_rounds=5)
    qera = {"init": "qera", **both}
    return (
        Method(QLORA, {"init": "lora", **both}, 8.0),
        Method(f"QPiSSA {_NF4}", {"init": "pissa", **both}, 2.0),
        Method(f"LoftQ {_NF4}", {"init": loftq, **both}, 8.0),
        Method(f"QERA {_NF4}", qera, 8.0, needs_moments=True),
    )


def is_quantized(name: str) -> bool:
    """Whether the name is of a method on a quantised base."""
    return name.endswith(_NF4)


def adapt_params(
    task: Task, method: Method, key: jax.Array, data: Any = None
) -> tuple[Any, str | None]:
    """Return (the tree to train, `also_train` of `fit`).

    Args:
        task: the task.
        method: the method.
        key: draws the factors.
        data: second moments from the task, if the method needs them.
    """
    if method.rule is None:
        patterns = [task.pattern, task.head] if task.head else [task.pattern]
        return task.params, "|".join(f"(?:{each})" for each in patterns)

    rule = jlora.Rule(task.pattern, task.rank, **method.rule)
    plan = jlora.make_plan(task.params, rule)
    return jlora.adapt(task.params, plan, key=key, data=data), task.head


def make_optimizer(task: Task, method: Method) -> optax.GradientTransformation:
    """Return an optimiser whose state holds the learning rate, under "rate".

    One object, and so one compiled step, serves all rates. The rate falls to zero
    along a cosine.
    """
    decay = optax.cosine_decay_schedule(1.0, task.num_steps)

    def make(rate: float) -> optax.GradientTransformation:
        weights = optax.chain(
            method.precondition(), optax.scale_by_schedule(decay), optax.scale(-rate)
        )
        if task.head is None:
            return weights
        schedule = optax.cosine_decay_schedule(task.head_rate, task.num_steps)
        head = optax.adam(schedule)
        return jlora.optimizers.by_path({task.head: head, ".*": weights})

    return optax.inject_hyperparams(make)(rate=0.0)


def guess_rate(task: Task, method: Method) -> float:
    """Return the rate in the middle of the first grid."""
    if method.is_scaled_gd:
        return task.scaled_rate
    return method.rate_factor * task.full_rate


def _adam_plus() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(), jlora.optimizers.lora_plus(PLUS_RATIO))


def _scaled_momentum() -> optax.GradientTransformation:
    return optax.chain(jlora.optimizers.scale_by_factor_gram(), optax.trace(0.9))
