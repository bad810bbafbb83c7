"""Language model: the demonstration's, from Python's library to its package `email`."""

import functools
from typing import Any

import jax
import optax

import jlora
from benchmarks.tasks.task import NEW, OLD, Metric, Task
from jlora.demo.corpus import (
    DOMAIN,
    GENERAL,
    list_batches,
    read_corpus,
    sample_batches,
)
from jlora.demo.model import ModelSize, bits_per_byte, init_model

SIZE = ModelSize()
BATCH_SIZE = 32
PRETRAIN_RATE = 4e-3
NUM_HELD_OUT = 16  # batches of each part
BITS = Metric("bits per byte", NEW, False)
OLD_BITS = Metric("bits per byte, old domain", OLD, False)


def make_task(num_steps: int, num_pretrain_steps: int) -> Task:
    """Return the task; its validation text is the end of the training text."""
    general, domain = read_corpus(GENERAL), read_corpus((DOMAIN,))

    length = len(domain.train) - len(domain.train) // 5
    train, validation = domain.train[:length], domain.train[length:]
    return Task(
        name="language model",
        model=f"transformer over bytes, width {SIZE.width}, {SIZE.num_layers} layers",
        shift="Python's standard library → its package email",
        params=_pretrain(general.train, num_pretrain_steps),
        loss=_compute_loss,
        sample=lambda seed: _sample(train, num_steps, seed + 1),
        num_steps=num_steps,
        validate=functools.partial(_compute_bits, _list_batches(validation)),
        measure=functools.partial(
            _measure, _list_batches(domain.held_out), _list_batches(general.held_out)
        ),
        metrics=(BITS, OLD_BITS),
        pattern="(attention|mlp)/|head",
        rank=32,
        num_columns=32,
        full_rate=2e-3,
        scaled_rate=0.1,
    )


def _sample(text: Any, num_steps: int, seed: int) -> Any:
    return sample_batches(text, num_steps, BATCH_SIZE, SIZE.context, seed)


def _list_batches(text: Any) -> list[Any]:
    return list_batches(text, NUM_HELD_OUT, BATCH_SIZE, SIZE.context)


def _pretrain(text: Any, num_steps: int) -> Any:
    rate = optax.warmup_cosine_decay_schedule(
        0.0, PRETRAIN_RATE, min(50, num_steps // 2), num_steps
    )
    return jlora.fit(
        _compute_loss,
        init_model(SIZE, key=jax.random.key(0)),
        optax.adamw(rate),
        _sample(text, num_steps, seed=0),
        also_train=".*",
        progress=False,
    ).adapted


def _compute_loss(params: Any, batch: Any) -> Any:
    return bits_per_byte(params, batch, SIZE.num_heads)


def _compute_bits(batches: list[Any], params: Any) -> float:
    return jlora.training.evaluate_loss(_compute_loss, params, batches)


def _measure(new: list[Any], old: list[Any], params: Any) -> dict[str, float]:
    return {
        BITS.name: _compute_bits(new, params),
        OLD_BITS.name: _compute_bits(old, params),
    }
