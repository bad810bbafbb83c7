"""The demonstration itself: pretrain, adapt in four ways, compare, save and load again."""

import functools
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jlora.adaptation.adapted_weight import merge
from jlora.adaptation.batching import adapt
from jlora.adaptation.paths import list_leaves, map_leaves
from jlora.adaptation.plan import make_plan
from jlora.adaptation.rule import Rule
from jlora.checkpoints.arrays import load_arrays, save_arrays
from jlora.demo.corpus import DOMAIN, GENERAL, cut_batches, read_corpus, sample_batches
from jlora.demo.model import ModelSize, bits_per_byte, init_model
from jlora.training.evaluation import evaluate_loss, measure_cost
from jlora.training.loop import fit, init_train

LINEAR_LAYERS = "(attention|mlp)/|head"
ALL_WEIGHTS = ".*"


class DemoSettings(NamedTuple):
    size: ModelSize = ModelSize()
    pretrain_steps: int = 450
    adapt_steps: int = 120
    batch_size: int = 32
    rank: int = 32
    num_eval_batches: int = 16
    pretrain_rate: float = 4e-3
    # Each the best of a search in steps of 1.3 to 2, by the held-out loss in the new domain.
    v_only_rate: float = 5e-3
    lora_rate: float = 1.3e-2
    full_rate: float = 2.3e-3


class DemoRow(NamedTuple):
    name: str
    new_domain: float  # held-out bits per byte
    old_domain: float  # held-out bits per byte
    num_trained: int
    optimizer_bytes: int
    step_ms: float
    params: Any  # plain tree, merged


def run_demo(settings=DemoSettings(), *, progress=None):  # noqa: B008 (an immutable default)
    """Print the demonstration, and return its rows and the loss of the weights loaded back."""
    general, domain = read_corpus(GENERAL), read_corpus((DOMAIN,))
    loss = _make_loss(settings.size.num_heads)
    params = init_model(settings.size, key=jax.random.key(0))
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"pretraining {num_weights} weights on {len(general.train)} bytes of {len(GENERAL)} "
        f"packages of Python's library, {settings.pretrain_steps} steps ...",
        flush=True,
    )
    steps = settings.pretrain_steps
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.pretrain_rate, min(50, steps), steps
    )
    batches = _sample(settings, general, steps, seed=0)
    params = fit(
        loss,
        params,
        optax.adamw(rate),
        batches,
        also_train=ALL_WEIGHTS,
        num_steps=steps,
        progress=progress,
    ).adapted
    print(
        f"adapting it to `{DOMAIN}`, rank {settings.rank}, {settings.adapt_steps} steps ..."
    )
    held_out = [_cut(settings, corpus.held_out) for corpus in (domain, general)]
    rows = [
        _run_way(
            name, tree, also_train, rate, settings, loss, domain, held_out, progress
        )
        for name, tree, also_train, rate in _list_ways(settings, params)
    ]
    print(_format_table(rows), flush=True)
    reloaded = _save_and_load(rows[1].params)
    value = evaluate_loss(loss, reloaded, held_out[0])
    print(
        f"V only, saved and loaded: {value:.6f} bits per byte, before: {rows[1].new_domain:.6f}"
    )
    return rows, value


@functools.cache
def _make_loss(num_heads):
    return lambda params, batch: bits_per_byte(params, batch, num_heads)


def _list_ways(settings, params):
    """Yield (name, tree, what else is trained, learning rate) of each row."""
    key = jax.random.key(1)
    v_only = make_plan(
        params, Rule(LINEAR_LAYERS, settings.rank, init="pissa", trainable="v")
    )
    lora = make_plan(
        params, Rule(LINEAR_LAYERS, settings.rank, init="lora", trainable="uv")
    )
    yield "no adaptation", params, None, None
    yield (
        "V only, from the SVD",
        adapt(params, v_only, key=key),
        None,
        settings.v_only_rate,
    )
    yield "classic LoRA", adapt(params, lora, key=key), None, settings.lora_rate
    yield "full fine-tuning", params, ALL_WEIGHTS, settings.full_rate


def _run_way(name, tree, also_train, rate, settings, loss, domain, held_out, progress):
    if rate is None:
        losses = [evaluate_loss(loss, tree, batches) for batches in held_out]
        return DemoRow(name, *losses, 0, 0, 0.0, tree)
    steps = settings.adapt_steps
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state, _ = init_train(tree, optimizer, also_train=also_train)
    cost = measure_cost(state)
    train = functools.partial(fit, loss, tree, optimizer, also_train=also_train)
    train(
        _sample(settings, domain, 2, seed=2), progress=False
    )  # compiles, outside the clock
    start = time.perf_counter()
    result = train(
        _sample(settings, domain, steps, seed=1), num_steps=steps, progress=progress
    )
    step_ms = 1e3 * (time.perf_counter() - start) / steps
    merged = merge(result.adapted)
    # Evaluated on the merged weights: what is saved is what is measured.
    losses = [evaluate_loss(loss, merged, batches) for batches in held_out]
    return DemoRow(name, *losses, *cost, step_ms, merged)


def _sample(settings, corpus, num_steps, seed):
    return sample_batches(
        corpus.train, num_steps, settings.batch_size, settings.size.context, seed
    )


def _cut(settings, text):
    return cut_batches(
        text, settings.num_eval_batches, settings.batch_size, settings.size.context
    )


def _save_and_load(params):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/adapted.safetensors"
        save_arrays(path, dict(list_leaves(params)))
        arrays = load_arrays(path)
        print(f"saved {len(arrays)} arrays to a safetensors file and loaded them back")
    return map_leaves(lambda name, _: np.asarray(arrays[name]), params)


def _format_table(rows):
    header = (
        "",
        f"{DOMAIN} (new)",
        "general (old)",
        "trained",
        "optimiser bytes",
        "ms/step",
    )
    cells = [
        (
            row.name,
            f"{row.new_domain:.4f}",
            f"{row.old_domain:.4f}",
            str(row.num_trained),
            str(row.optimizer_bytes),
            f"{row.step_ms:.1f}" if row.step_ms else "-",
        )
        for row in rows
    ]
    widths = [
        max(len(line[column]) for line in (header, *cells)) for column in range(6)
    ]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [
                cell.rjust(width)
                for cell, width in zip(line[1:], widths[1:], strict=True)
            ]
        )
        for line in (header, *cells)
    ]
    return "\n".join(
        [lines[0].rstrip(), *lines[1:], "losses are held-out bits per byte"]
    )
