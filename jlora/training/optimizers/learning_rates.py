"""Learning rates that differ between the factors."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jlora._types import Scalar, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.training.optimizers.weights import map_weights


def lora_plus(ratio: Scalar = 16.0) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that multiplies the updates of v by a ratio (LoRA+).

    With v zero and u random, as `lora` starts, v should learn faster than u. In PEFT's
    letters A = uᵀ and B = vᵀ, and B gets the larger learning rate. Updates of u, of
    cores and of plain leaves are unchanged.

    Use it last in a chain, after Adam: `optax.chain(optax.adam(1e-4),
    jlora.optimizers.lora_plus())`. Before Adam it has no effect.

    Args:
        ratio: learning rate of v over the learning rate of u.

    Returns:
        optax.GradientTransformationExtraArgs, without state.

    Source: Hayou, Ghosh, Yu, "LoRA+: efficient low rank adaptation of large models",
        2024.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, trainable="uv"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> trainable, _ = jlora.split_trainable(adapted)
        >>> updates = jax.tree.map(jnp.ones_like, trainable)
        >>> optimizer = jlora.optimizers.lora_plus(16.0)
        >>> scaled, _ = optimizer.update(updates, optimizer.init(trainable))
        >>> scaled["w"].u[0].tolist(), scaled["w"].v[0].tolist()
        ([1.0], [16.0, 16.0, 16.0])
    """

    def init(params: Tree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def scale_v(path: str, update: AdaptedWeight) -> AdaptedWeight:
        del path
        if update.v is None:
            return update
        return dataclasses.replace(update, v=(update.v * ratio).astype(update.v.dtype))

    def update(
        updates: Tree,
        state: Any,  # EmptyState
        params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, optax.EmptyState]:
        del params, extra_args
        return map_weights(scale_v, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
