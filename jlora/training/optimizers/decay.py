"""`add_decayed_delta`: weight decay of what was learned, not of the model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from jlora import _checks
from jlora._types import Scalar, Tree


class DecayedDeltaState(NamedTuple):
    """The trained arrays at the start of training."""

    initial: Tree


def add_decayed_delta(weight_decay: Scalar) -> optax.GradientTransformationExtraArgs:
    """Return an optax transformation: weight decay towards the start of training.

    It adds weight_decay * (array - its value at `init`) to the update of each trained
    array. `optax.add_decayed_weights`, and so `optax.adamw`, adds weight_decay * array:
    right for factors that begin with a delta of zero, such as those of init="lora". The
    factors of "pissa", "milora", "olora" and "corda" hold a part of the weight itself,
    and that decay removes the part: with a zero gradient, twenty steps of
    adamw(0.1, weight_decay=0.5) move such a weight by more than half of itself.

    With a frozen u the change u (v - v0) decays exactly. Use it where `optax.adamw` has
    its decay, before the learning rate:
    `optax.chain(optax.scale_by_adam(), add_decayed_delta(0.01), optax.scale(-1e-3))`.

    Args:
        weight_decay: ≥ 0, as in `optax.add_decayed_weights`.

    Returns:
        An `optax.GradientTransformationExtraArgs`; its state holds a copy of the
        trained arrays.

    Raises:
        TypeError, ValueError: a weight decay that is no number, or a negative one.

    Source: L2-SP, Li, Grandvalet, Davoine 2018, section 3.2.

    Example:
        >>> import jax.numpy as jnp, jlora, optax
        >>> decay = jlora.optimizers.add_decayed_delta(0.5)
        >>> state = decay.init({"v": jnp.ones(2)})
        >>> updates, _ = decay.update(
        ...     {"v": jnp.zeros(2)}, state, {"v": jnp.array([1.0, 3.0])})
        >>> updates["v"].tolist()
        [0.0, 1.0]
    """
    weight_decay = _checks.check_scalar(weight_decay, "weight_decay", minimum=0)

    def init(params: Tree) -> DecayedDeltaState:
        return DecayedDeltaState(params)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, Any]:
        del extra
        if params is None:
            raise ValueError(
                "`params` must be given to the update of add_decayed_delta, got None. "
                "Pass the trained arrays."
            )

        def add(update: Any, array: Any, start: Any) -> Any:
            return update + (weight_decay * (array - start)).astype(update.dtype)

        return jax.tree.map(add, updates, params, state.initial), state

    return optax.GradientTransformationExtraArgs(init, update)
