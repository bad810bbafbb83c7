"""Folds of a cross-validation, and the batches of their training parts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from jlora._types import Int, PRNGKey

Indices = Int[np.ndarray, " count"]


def assign_folds(num_examples: int, folds: int, key: PRNGKey) -> list[Indices]:
    """Return the held-out examples of each fold: every example is in exactly one.

    The sizes differ by at most one, and the larger folds are the first ones.
    """
    order = make_generator(key, 0).permutation(num_examples)
    return [np.sort(part) for part in np.array_split(order, folds)]


def draw_batches(
    held_out: Sequence[Indices], batch_size: int, num_steps: int, key: PRNGKey
) -> Int[np.ndarray, "folds steps batch"]:
    """Return the examples of each batch of each fold, without the held-out ones.

    Each epoch has an order of its own and leaves out the last, incomplete batch.
    """
    everyone = np.sort(np.concatenate(held_out))
    batches = []
    for fold, own in enumerate(held_out):
        training = np.setdiff1d(everyone, own)
        generator = make_generator(key, fold)
        batches.append(_draw_epochs(training, batch_size, num_steps, generator))
    return np.stack(batches).astype(np.int32)


def _draw_epochs(
    training: Indices, batch_size: int, num_steps: int, generator: np.random.Generator
) -> Int[np.ndarray, "steps batch"]:
    per_epoch = len(training) // batch_size
    num_epochs = -(-num_steps // per_epoch)

    epochs = []
    for _ in range(num_epochs):
        order = training
        if batch_size < len(training):  # a full batch is the same in any order
            order = generator.permutation(training)
        epochs.append(order[: per_epoch * batch_size].reshape(per_epoch, batch_size))
    return np.concatenate(epochs)[:num_steps]


def make_generator(key: PRNGKey, index: int) -> np.random.Generator:
    """Return a generator of NumPy for a key and an index."""
    # One eager permutation of JAX for each epoch of each fold would take longer than
    # many a training step.
    words = np.asarray(jax.random.key_data(key)).tolist()
    return np.random.default_rng([*words, index])
