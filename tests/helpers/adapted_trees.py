"""A small tree of weights, adapted and trained, and its parts in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import jlora

KEY = jax.random.key(0)
EPS = float(jnp.finfo(jnp.float32).eps)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Matrices of 12×8, of which "torch" is stored with its outputs first.
PARAMS = {
    "bias": draw(0, 8),
    "q": draw(1, 12, 8),
    "stack": draw(2, 3, 12, 8),
    "torch": draw(3, 8, 12),
}


def adapt(params, rank=3, **settings):
    """Adapt every matrix; "torch" has the layout "oi"."""
    rules = [jlora.Rule(".", rank, **settings)]
    if "torch" in params:
        rules.insert(0, jlora.Rule("torch", rank, layout="oi", **settings))
    return jlora.adapt(params, jlora.make_plan(params, rules), key=KEY)


def train(adapted):
    """Return the tree with noise added to its trainable arrays."""
    trainable, frozen = jlora.split_trainable(adapted)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * draw(leaf.size, *leaf.shape), trainable
    )
    return jlora.join(moved, frozen)


def view(array, path=""):
    """Return the matrix of a stored array in float64, inputs first."""
    matrix = np.asarray(array, np.float64)
    return matrix.mT if path == "torch" else matrix


def get_change(w):
    """Return scale * u @ core @ v in float64."""
    core = np.eye(w.u.shape[-1]) if w.core is None else view(w.core)
    core = core[..., None] * np.eye(w.u.shape[-1]) if w.trainable == "s" else core
    return float(w.scale) * view(w.u) @ core @ view(w.v)
