"""The leaves of a tree of weights, by path."""

import zlib

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


def fold_path(key, path):
    """Return a key of this path's own: by its name, so that other paths change nothing."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def why_not_a_matrix(leaf, layout="io"):
    """Return why a leaf cannot be factorised, or None if it can."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"is a {type(leaf).__name__}, not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"has dtype {leaf.dtype}, not a real floating one"
    shape = tuple(leaf.shape)
    if len(shape) < len(layout):
        number = {2: "two", 3: "three", 4: "four", 5: "five"}.get(
            len(layout), len(layout)
        )
        named = "" if layout == "io" else f" (layout {layout!r})"
        return f"has shape {shape}, fewer than {number} axes{named}"
    if 0 in shape:
        return f"has shape {shape}, no elements"
    return None
