"""Unmodified functions of plain weights, run on adapted ones."""

import functools

from jlora.adaptation.tree import merge


def on_merged(fn):
    """Return fn(params, ...) as a function of the adapted tree, by rebuilding the weights inside.

    Simple, and it works for any function; each call forms every adapted weight, and so does its
    gradient.

    Args:
        fn: function whose first argument is the tree of plain weights.

    Returns:
        The same function with the adapted tree as its first argument.

    Gradients: exact, to the factors and the base.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> total = jlora.on_merged(lambda params: params["w"].sum())
        >>> round(float(total(adapted)), 3)
        12.0
    """

    @functools.wraps(fn)
    def run(adapted, *args, **kwargs):
        return fn(merge(adapted), *args, **kwargs)

    return run
