"""Train, validation and test parts of a sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Indices of the examples of each part."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_examples(
    num_examples: int, seed: int = 0, fractions: Sequence[float] = (0.5, 0.2)
) -> Split:
    """Return a random `Split`.

    Args:
        num_examples: to split.
        seed: of the order.
        fractions: of the train and of the validation part; the rest is the test part.
    """
    order = np.random.default_rng(seed).permutation(num_examples)
    ends = np.cumsum(np.round(np.array(fractions) * num_examples).astype(int))
    return Split(*np.split(order, ends))


def sample_indices(
    indices: np.ndarray, batch_size: int, num_batches: int, seed: int
) -> list[np.ndarray]:
    """Return batches of indices: epochs in random order, one after the other."""
    rng = np.random.default_rng(seed)
    num_epochs = -(-batch_size * num_batches // len(indices))
    order = np.concatenate([rng.permutation(indices) for _ in range(num_epochs)])
    return list(order[: batch_size * num_batches].reshape(num_batches, batch_size))
