"""Checks of the arguments of `cross_validate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._types import Tree
from jlora.adaptation.paths import list_leaves


def check_ranks(ranks: Any) -> tuple[int, ...]:
    """Return the ranks as a tuple of different positive integers."""
    _check_sequence(ranks, "ranks", "integers")
    checked = tuple(_checks.check_integer(rank, "ranks") for rank in ranks)
    _check_different(checked, "ranks")
    return checked


def check_rates(rates: Any) -> tuple[float, ...]:
    """Return the learning rates as a tuple of different positive floats."""
    _check_sequence(rates, "rates", "numbers")
    checked = []
    for rate in rates:
        number = float(_checks.check_scalar(rate, "rates"))
        if not (math.isfinite(number) and number > 0):
            raise ValueError(
                f"`rates` must be positive and finite, got {number}. Leave it out."
            )
        checked.append(number)
    _check_different(checked, "rates")
    return tuple(checked)


def check_examples(examples: Tree) -> tuple[Tree, int]:
    """Return the examples as JAX arrays, and their number."""
    leaves = list_leaves(examples)
    if not leaves:
        raise ValueError(
            "`examples` must hold at least one array, got none. Pass the inputs and "
            "targets that a batch of the loss consists of."
        )
    for path, leaf in leaves:
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"`examples` must hold arrays, got {type(leaf).__name__} at "
                f"{path or 'the top'}. Convert it with np.asarray."
            )
        if not leaf.shape:
            raise ValueError(
                f"`examples` must hold arrays with an axis of examples first, got a "
                f"scalar at {path or 'the top'}. Let the loss close over it."
            )

    first_path, first = leaves[0]
    for path, leaf in leaves:
        if leaf.shape[0] != first.shape[0]:
            raise ValueError(
                f"`examples` must have one length, got {first.shape[0]} at "
                f"{first_path} and {leaf.shape[0]} at {path}. Check the first axis "
                "of both."
            )
    return jax.tree.map(jnp.asarray, examples), int(first.shape[0])


def check_folds(folds: Any, num_examples: int) -> int:
    """Return the number of folds, from two to the number of examples."""
    folds = _checks.check_integer(folds, "folds", minimum=2)
    if folds > num_examples:
        raise ValueError(
            f"`folds` must be at most the number of examples, {num_examples}, got "
            f"{folds}. Choose fewer folds."
        )
    return folds


def check_batch_size(batch_size: Any, num_training: int) -> int:
    """Return the batch size; None becomes the size of the training part."""
    if batch_size is None:
        return num_training
    batch_size = _checks.check_integer(batch_size, "batch_size")
    if batch_size > num_training:
        raise ValueError(
            "`batch_size` must be at most the number of examples of a training part, "
            f"{num_training}, got {batch_size}. Choose a smaller one, or None."
        )
    return batch_size


def check_make_optimizer(optimizer: Any, rate: float) -> None:
    """Refuse anything but a function from a rate to an optax transformation."""
    made = optimizer
    is_made = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if callable(optimizer) and not is_made:
        made = optimizer(rate)
    if is_made or not (hasattr(made, "init") and hasattr(made, "update")):
        raise TypeError(
            "`optimizer` must be a function from a learning rate to an "
            f"optax.GradientTransformation, got {_describe(optimizer, made)}. Pass "
            "for example optax.adam, without a call."
        )


def check_scalar_loss(
    loss: Callable[..., Any], name: str, params: Tree, batch: Any
) -> None:
    """Refuse a loss or metric that is no function to one real floating number."""
    if not callable(loss):
        raise TypeError(
            f"`{name}` must be a function of (params, batch), got "
            f"{type(loss).__name__}. Pass one."
        )
    value = jax.eval_shape(loss, params, batch)
    leaf = value if isinstance(value, jax.ShapeDtypeStruct) else None
    if leaf is None or leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
        got = type(value).__name__ if leaf is None else f"{leaf.dtype} of {leaf.shape}"
        raise TypeError(
            f"`{name}` must return one real floating number, got {got}. Return the "
            "mean over the examples of the batch."
        )


def check_any_finite(errors: np.ndarray) -> None:
    """Refuse the result if there is no rank and rate with a finite mean error."""
    if not np.isfinite(errors).all(axis=-1).any():
        raise ValueError(
            "`rates` must train at least one candidate without NaN or Inf in all "
            "folds, got none. Lower the rates, or check the loss and the examples."
        )


def _check_sequence(values: Any, name: str, kind: str) -> None:
    is_array = isinstance(values, (np.ndarray, jax.Array)) and values.ndim == 1
    if isinstance(values, str) or not (isinstance(values, Sequence) or is_array):
        raise TypeError(
            f"`{name}` must be a sequence of {kind}, got {type(values).__name__}. "
            "Write a list, also for a single one."
        )
    if not len(values):
        raise ValueError(
            f"`{name}` must hold at least one number, got none. Give those to try."
        )


def _check_different(values: Sequence[float], name: str) -> None:
    if len(set(values)) < len(values):
        raise ValueError(
            f"`{name}` must differ from each other, got {list(values)}. Give each one "
            "once."
        )


def _describe(optimizer: Any, made: Any) -> str:
    if made is not optimizer:
        return f"a function to {type(made).__name__}"
    return type(optimizer).__name__
