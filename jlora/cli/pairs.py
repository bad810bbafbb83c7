"""`--data`: training V on pairs of inputs and outputs of a matrix."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import optax

from jlora import _checks
from jlora._numerics import frobenius_norm
from jlora._types import AnyArray, Array, Float
from jlora.adaptation.adapted_weight import AdaptedWeight, linear
from jlora.adaptation.plan import Plan
from jlora.checkpoints.arrays import load_arrays
from jlora.training.loop import fit

_BATCH_ROWS = 256

Pairs = tuple[Float[AnyArray, "N m"], Float[AnyArray, "N n"]]  # inputs, outputs


def read_pairs(arguments: argparse.Namespace, plan: Plan) -> Pairs:
    """Return x [N, m] and y [N, n] of the file, checked against the planned weights."""
    path = arguments.data
    pairs = load_arrays(path)
    if not {"x", "y"} <= pairs.keys():
        raise ValueError(
            f"{path}: `--data` must hold arrays named x and y, got "
            f"{', '.join(pairs) or 'none'}. Save it with numpy.savez(path, x=x, y=y)."
        )

    x, y = (_checks.check_matrix(pairs[name], f"{name} in {path}") for name in "xy")
    for name, array in (("x", x), ("y", y)):
        _checks.check_finite(array, f"{name} in {path}")
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0] or x.shape[0] < 2:
        raise ValueError(
            f"{path}: x and y must be [N, m] and [N, n] with N of at least 2, got "
            f"{x.shape} and {y.shape}. Pair each input with one output."
        )

    expected = (x.shape[-1], y.shape[-1])
    meaning = f"the columns of x and y in {path}"
    for entry in plan.entries:
        _checks.check_shape(entry.shape, expected, entry.path, meaning)
    return x, y


def train_on_pairs(
    arguments: argparse.Namespace, w: AdaptedWeight, x: AnyArray, y: AnyArray
) -> tuple[AdaptedWeight, str]:
    """Return the weight with V trained so that x @ w meets y, and a note about it.

    A tenth of the rows is held out to measure the error that the note gives.
    """
    # Shuffle the rows, and hold out the first ones.
    rng = np.random.default_rng(arguments.seed)
    order = rng.permutation(len(x))
    x, y = (np.asarray(array, w.v.dtype)[order] for array in (x, y))
    num_held_out = max(1, len(x) // 10)
    held_out = x[:num_held_out], y[:num_held_out]
    x, y = x[num_held_out:], y[num_held_out:]

    # Adam moves each entry by about the learning rate, so scale it like V.
    root_mean_square = float(jnp.sqrt(jnp.mean(w.v**2))) or 1.0
    peak = arguments.learning_rate * root_mean_square
    optimizer = optax.adam(optax.cosine_decay_schedule(peak, arguments.steps))

    batches = _sample_rows(rng, x, y, arguments.steps)
    result = fit(_mean_square_error, w, optimizer, batches, num_steps=arguments.steps)
    if result.stop_reason:
        raise ValueError(
            f"`--data` must train to a finite loss, got: {result.stop_reason}"
        )

    before, after = (
        _relative_error(weight, *held_out) for weight in (w, result.adapted)
    )
    rows = f"{num_held_out} of {len(order)} rows"
    return result.adapted, f", held-out error {before:.4g} -> {after:.4g} ({rows})"


def _sample_rows(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, num_steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for _ in range(num_steps):
        rows = rng.choice(len(x), min(_BATCH_ROWS, len(x)), replace=False)
        yield x[rows], y[rows]


def _mean_square_error(w: AdaptedWeight, batch: Pairs) -> Float[Array, ""]:
    x, y = batch
    return jnp.mean((linear(x, w) - y) ** 2)


def _relative_error(
    w: AdaptedWeight, x: Float[AnyArray, "N m"], y: Float[AnyArray, "N n"]
) -> float:
    # Errors of targets that are all zero are absolute.
    norm = frobenius_norm(jnp.asarray(y))
    return float(frobenius_norm(linear(x, w) - y) / jnp.where(norm > 0, norm, 1))
