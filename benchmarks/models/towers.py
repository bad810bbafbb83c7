"""Matrix factorisation with side features: a tower for users and one for items.

Every matrix product with a weight goes through `jlora.linear`, so the same function
runs on the plain tree and on the adapted tree.
"""

from typing import Any

import jax
import jax.numpy as jnp

import jlora

HIDDEN, WIDTH = 64, 32


def init_towers(
    num_items: int, num_user_features: int, num_item_features: int, key: jax.Array
) -> dict[str, Any]:
    """Return random weights, matrices as [inputs, outputs].

    The tree has this structure:

        users    hidden, out
        items    features, own [items, WIDTH], bias [items]
    """
    keys = iter(jax.random.split(key, 4))

    def matrix(rows, columns, gain=1.0):
        shape = rows, columns
        return gain * rows**-0.5 * jax.random.normal(next(keys), shape, jnp.float32)

    return {
        "users": {
            "hidden": matrix(num_user_features, HIDDEN),
            "out": matrix(HIDDEN, WIDTH),
        },
        "items": {
            "features": matrix(num_item_features, WIDTH),
            "own": matrix(num_items, WIDTH, 0.1),
            "bias": jnp.full(num_items, 3.0, jnp.float32),
        },
    }


def predict_ratings(params, user_features, item_features, items):
    """Return a rating [batch] for each user and item.

    Args:
        user_features: [batch, user features].
        item_features: [batch, item features], of these items.
        items: Numbers of the items, [batch].
    """
    users, own = params["users"], params["items"]
    hidden = jnp.tanh(jlora.linear(user_features, users["hidden"]))
    tastes = jlora.linear(hidden, users["out"])
    qualities = jlora.linear(item_features, own["features"]) + own["own"][items]
    return jnp.mean(tastes * qualities, axis=-1) + own["bias"][items]
