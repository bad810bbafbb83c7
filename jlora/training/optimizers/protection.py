"""Updates kept off a protected subspace."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import optax

from jlora import _checks
from jlora._types import Array, Float, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.paths import list_leaves
from jlora.training.gradient_steps import project_gradient_out
from jlora.training.optimizers.weights import map_weights


class ProjectOutState(NamedTuple):
    """The protected subspaces; they are arrays, so that no program holds them."""

    bases: dict[str, Float[Array, "*batch k p"]]  # by path, orthonormal columns


def project_out(
    bases: Tree, *, side: Literal["left", "right"] = "left"
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that keeps a subspace of each weight untouched.

    "left" protects inputs: x @ w does not change for x in the span of the basis. It
    projects the updates of u, so u must be trained and v frozen. "right" protects
    outputs: x @ w changes only outside the span. It projects the updates of v.

    With Adam use it twice: `optax.chain(project, optax.adam(1e-3), project)`. The last
    one keeps the steps in the projected space, which Adam leaves. The first one makes
    Adam see the gradient of that space: if most of the gradient is projected out, steps
    from the whole gradient need not descend. With `optax.sgd` once is enough.

    Args:
        bases: {path: [..., k, p]} or a tree like params; orthonormal columns, k = m for
            "left" and k = n for "right", such as the leading right singular vectors of
            the old domain's activations. A weight that is not in it is unchanged.
        side: static, the protected side.

    Returns:
        optax.GradientTransformationExtraArgs; its state holds the bases.

    Raises:
        ValueError: when it is initialised for a weight whose protected side depends on
            an array that it cannot project (with the path), or with another side.

    Source: Saha, Garg, Roy, "Gradient projection memory for continual learning", 2021.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> params = {"w": jnp.zeros((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, init="lora"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> bases = {"w": jnp.eye(3, 1)}  # the first output
        >>> optimizer = optax.chain(
        ...     optax.adam(0.1), jlora.optimizers.project_out(bases, side="right"))
        >>> def loss(params, x):
        ...     return jnp.sum(x @ params["w"])
        >>> batches = [jnp.eye(4)] * 3
        >>> result = jlora.fit(loss, adapted, optimizer, batches, progress=False)
        >>> bool((result.adapted["w"].v[:, 0] == 0).all())
        True
    """
    _checks.check_choice(side, ("left", "right"), "side")
    by_path = dict(list_leaves(bases))

    def init(params: Tree) -> ProjectOutState:
        def check(path: str, weight: AdaptedWeight) -> AdaptedWeight:
            if path in by_path:
                _check_projectable(path, weight, side)
            return weight

        map_weights(check, params)
        return ProjectOutState(by_path)

    def update(
        updates: Tree,
        state: Any,  # ProjectOutState
        params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, ProjectOutState]:
        del params, extra_args

        def project(path: str, update: AdaptedWeight) -> AdaptedWeight:
            if path not in state.bases:
                return update
            basis = state.bases[path]
            if side == "left":
                u = project_gradient_out(update.u, basis)
                return dataclasses.replace(update, u=u)
            v = project_gradient_out(update.v, basis, side="right")
            return dataclasses.replace(update, v=v)

        return map_weights(project, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_projectable(path: str, weight: AdaptedWeight, side: str) -> None:
    needed = "u" if side == "left" else "v"
    if weight.trainable != needed or weight.num_columns is not None:
        raise ValueError(
            f"{path}: `trainable` must be {needed!r} with all columns to protect the "
            f"{side} side, got {weight.trainable!r}. Change the rule, or the side."
        )
