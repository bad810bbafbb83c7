"""The leaves of a tree of weights, by path."""

import jax
import jax.numpy as jnp


def list_leaves(params, is_leaf=None):
    """Return [(path, leaf)] of a pytree; a path joins its keys with "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    return [(format_path(path), leaf) for path, leaf in leaves]


def map_leaves(fn, params, is_leaf=None):
    """Return the tree with fn(path, leaf) in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(format_path(path), leaf), params, is_leaf=is_leaf
    )


def format_path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def why_not_a_matrix(leaf):
    """Return why a leaf cannot be factorised, or None if it can."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"is a {type(leaf).__name__}, not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"has dtype {leaf.dtype}, not a real floating one"
    if len(leaf.shape) < 2:
        return f"has shape {tuple(leaf.shape)}, fewer than two axes"
    if 0 in leaf.shape:
        return f"has shape {tuple(leaf.shape)}, no elements"
    return None
