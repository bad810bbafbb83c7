"""The demonstration: pretrain, adapt in four ways, compare, save and load."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from jlora._types import Array, Float, Tree
from jlora.adaptation.batching import adapt
from jlora.adaptation.merging import merge
from jlora.adaptation.paths import list_leaves, map_leaves
from jlora.adaptation.plan import make_plan
from jlora.adaptation.rule import Rule
from jlora.checkpoints.arrays import load_arrays, save_arrays
from jlora.demo.corpus import (
    DOMAIN,
    GENERAL,
    Batch,
    Corpus,
    Text,
    list_batches,
    read_corpus,
    sample_batches,
)
from jlora.demo.model import ModelSize, bits_per_byte, init_model
from jlora.training.evaluation import evaluate_loss, measure_cost
from jlora.training.loop import fit
from jlora.training.steps import init_train

LINEAR_LAYERS = "(attention|mlp)/|head"
ALL_WEIGHTS = ".*"

Loss = Callable[[Tree, Batch], Float[Array, ""]]


class DemoSettings(NamedTuple):
    """Sizes and learning rates of the demonstration."""

    size: ModelSize = ModelSize()
    pretrain_steps: int = 450
    adapt_steps: int = 120
    batch_size: int = 32
    rank: int = 32
    num_eval_batches: int = 16
    pretrain_rate: float = 4e-3
    # Each rate is the best of a search in steps of 1.3 to 2, by the held-out loss in
    # the new domain.
    v_only_rate: float = 5e-3
    lora_rate: float = 1.3e-2
    full_rate: float = 2.3e-3


class DemoRow(NamedTuple):
    """One row of the table."""

    name: str
    new_domain: float  # held-out bits per byte
    old_domain: float  # held-out bits per byte
    num_trained: int
    optimizer_bytes: int
    step_ms: float
    params: Tree  # plain weights after merging


class _Method(NamedTuple):
    """One way to adapt the model."""

    name: str
    params: Tree  # plain or adapted weights before training
    also_train: str | None  # plain weights to train, see `fit`
    rate: float | None  # learning rate; None: no training


class _Task(NamedTuple):
    """The data and the loss that all methods share."""

    settings: DemoSettings
    loss: Loss
    train: Text
    held_out: tuple[list[Batch], list[Batch]]  # of the new and of the old domain
    progress: bool | None


def run_demo(
    settings: DemoSettings = DemoSettings(),  # noqa: B008 (an immutable default)
    *,
    progress: bool | None = None,
) -> tuple[list[DemoRow], float]:
    """Print the demonstration, and return the rows of its table and the last loss.

    That is the held-out loss of the "V only" weights after they were saved and loaded.
    """
    # Pretrain on the general corpus.
    general, domain = read_corpus(GENERAL), read_corpus((DOMAIN,))
    loss = _make_loss(settings.size.num_heads)
    params = _pretrain(settings, loss, general.train, progress)

    # Adapt to the new domain in each way.
    print(
        f"adapting it to `{DOMAIN}`, rank {settings.rank}, {settings.adapt_steps} "
        "steps ..."
    )
    held_out = _list_held_out(settings, domain), _list_held_out(settings, general)
    task = _Task(settings, loss, domain.train, held_out, progress)
    rows = [_run_method(task, method) for method in _list_methods(settings, params)]
    print(_format_table(rows), flush=True)

    # The merged weights are plain arrays, so any program can load them.
    v_only = rows[1]
    reloaded = _save_and_load(v_only.params)
    value = evaluate_loss(loss, reloaded, held_out[0])
    print(
        f"V only, saved and loaded: {value:.6f} bits per byte, before: "
        f"{v_only.new_domain:.6f}"
    )
    return rows, value


@functools.cache
def _make_loss(num_heads: int) -> Loss:
    return lambda params, batch: bits_per_byte(params, batch, num_heads)


def _pretrain(
    settings: DemoSettings, loss: Loss, text: Text, progress: bool | None
) -> Tree:
    params = init_model(settings.size, key=jax.random.key(0))
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    steps = settings.pretrain_steps
    print(
        f"pretraining {num_weights} weights on {len(text)} bytes of {len(GENERAL)} "
        f"packages of Python's library, {steps} steps ...",
        flush=True,
    )

    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.pretrain_rate, min(50, steps), steps
    )
    result = fit(
        loss,
        params,
        optax.adamw(rate),
        _sample(settings, text, steps, seed=0),
        also_train=ALL_WEIGHTS,
        num_steps=steps,
        progress=progress,
    )
    return result.adapted


def _list_methods(settings: DemoSettings, params: Tree) -> Iterator[_Method]:
    """Yield the method of each row, in the order of the table."""
    key, rank = jax.random.key(1), settings.rank
    yield _Method("no adaptation", params, None, None)

    rule = Rule(LINEAR_LAYERS, rank, init="pissa", trainable="v")
    v_only = adapt(params, make_plan(params, rule), key=key)
    yield _Method("V only, from the SVD", v_only, None, settings.v_only_rate)

    rule = Rule(LINEAR_LAYERS, rank, init="lora", trainable="uv")
    lora = adapt(params, make_plan(params, rule), key=key)
    yield _Method("classic LoRA", lora, None, settings.lora_rate)

    yield _Method("full fine-tuning", params, ALL_WEIGHTS, settings.full_rate)


def _run_method(task: _Task, method: _Method) -> DemoRow:
    """Return the row of one method: train, merge, and evaluate on both domains."""
    if method.rate is None:
        losses = _evaluate(task, method.params)
        return DemoRow(method.name, *losses, 0, 0, 0.0, method.params)

    settings, steps = task.settings, task.settings.adapt_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(method.rate, steps))
    state, _ = init_train(method.params, optimizer, also_train=method.also_train)
    cost = measure_cost(state)
    train = functools.partial(
        fit, task.loss, method.params, optimizer, also_train=method.also_train
    )

    # Compile outside of the measured time, then train from the same weights.
    train(_sample(settings, task.train, 2, seed=2), progress=False)
    batches = _sample(settings, task.train, steps, seed=1)
    start = time.perf_counter()
    result = train(batches, num_steps=steps, progress=task.progress)
    step_ms = 1e3 * (time.perf_counter() - start) / steps

    # Evaluate the merged weights, which are the ones that are saved.
    merged = merge(result.adapted)
    return DemoRow(method.name, *_evaluate(task, merged), *cost, step_ms, merged)


def _evaluate(task: _Task, params: Tree) -> tuple[float, float]:
    """Return the held-out losses in the new and in the old domain."""
    new, old = task.held_out
    return evaluate_loss(task.loss, params, new), evaluate_loss(task.loss, params, old)


def _sample(
    settings: DemoSettings, text: Text, num_steps: int, seed: int
) -> Iterator[Batch]:
    length = settings.size.context
    return sample_batches(text, num_steps, settings.batch_size, length, seed)


def _list_held_out(settings: DemoSettings, corpus: Corpus) -> list[Batch]:
    num_batches, length = settings.num_eval_batches, settings.size.context
    return list_batches(corpus.held_out, num_batches, settings.batch_size, length)


def _save_and_load(params: Tree) -> Tree:
    """Return the weights after a round trip through a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/adapted.safetensors"
        save_arrays(path, dict(list_leaves(params)))
        arrays = load_arrays(path)
        print(f"saved {len(arrays)} arrays to a safetensors file and loaded them back")
    return map_leaves(lambda name, _: np.asarray(arrays[name]), params)


def _format_table(rows: Sequence[DemoRow]) -> str:
    header = (
        "",
        f"{DOMAIN} (new)",
        "general (old)",
        "trained",
        "optimiser bytes",
        "ms/step",
    )
    lines = [header, *map(_format_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    # The first column is aligned left, the numbers right.
    texts = []
    for name, *numbers in lines:
        aligned = map(str.rjust, numbers, widths[1:])
        texts.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join([*texts, "losses are held-out bits per byte"])


def _format_cells(row: DemoRow) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.new_domain:.4f}",
        f"{row.old_domain:.4f}",
        str(row.num_trained),
        str(row.optimizer_bytes),
        f"{row.step_ms:.1f}" if row.step_ms else "-",
    )
