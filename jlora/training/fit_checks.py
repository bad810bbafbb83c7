"""Checks of the arguments of `fit`."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from jlora import _checks


def check_fit(loss: Any, adapted: Any, optimizer: Any, batches: Any) -> None:
    """Refuse arguments of `fit` that would fail later, with a message of JAX."""
    _check_outside_of_jit(adapted)
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a function of (params, batch), got {type(loss).__name__}. "
            "Pass one."
        )
    if not _is_hashable(loss):
        raise TypeError(
            f"`loss` must be hashable, got a {type(loss).__name__} without a hash. "
            "Wrap it in a function."
        )

    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be an optax.GradientTransformation, got "
            f"{type(optimizer).__name__}. Write for example optax.adam(1e-3)."
        )

    is_one_batch = isinstance(batches, (str, bytes, dict))
    if is_one_batch or not hasattr(batches, "__iter__"):
        raise TypeError(
            "`batches` must be an iterable of batches, got "
            f"{type(batches).__name__}. Put a single batch in a list."
        )


def check_fit_options(
    *, key: Any, evaluate: Any, callback: Any, **counts: Any
) -> dict[str, Any]:
    """Return the checked numbers of steps of `fit`, by name; None stays None."""
    if key is not None:
        _checks.check_key(key)
    for name, function in (("evaluate", evaluate), ("callback", callback)):
        if function is not None and not callable(function):
            raise TypeError(
                f"`{name}` must be a function, got {type(function).__name__}. Pass one."
            )
    if counts["patience"] is not None and evaluate is None:
        raise ValueError(
            "`evaluate` must be given with patience, got None. Pass a function of the "
            "adapted tree."
        )
    return {
        name: value if value is None else _checks.check_integer(value, name)
        for name, value in counts.items()
    }


def _check_outside_of_jit(adapted: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(adapted)):
        raise TypeError(
            "`adapted` must hold values, got traced arrays. Call fit outside of "
            "jax.jit, jax.grad and jax.vmap, or use jlora.train_step inside."
        )


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
