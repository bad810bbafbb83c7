"""Unmodified functions of plain weights, run on adapted ones."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adaptation.adapted_weight import is_adapted, merge
from jlora.adaptation.paths import format_path
from jlora.layouts import complete_layout, split_shape


def lift(fn, *, materialize=False):
    """Return fn as a function of adapted weights, the delta never formed.

    Wherever a weight meets a product (x @ w, einsum, dot_general in any orientation), a lookup or
    a convolution, the thin factors are applied beside the base. It may be cast, transposed,
    reshaped, sliced, split and scaled on the way, taken from a stack or scanned over, under jit,
    grad, vmap and remat, inside fn or around it.

    Args:
        fn: function of pytrees of arrays that JAX can trace: of a dict of weights, with
            flax.linen `module.apply`, with flax.nnx `lambda state, x: nnx.merge(graph, state)(x)`,
            of an Equinox module. Leaves that are no arrays reach it as they are.
        materialize: static. An operation that has no rule needs the whole weight: form it there
            (True), or raise (False).

    Returns:
        The function; an `AdaptedWeight` may stand in any argument in place of an array. Put
        jax.jit around it: run eagerly, it traces fn at each call.

    Raises:
        ImportError: quax is not installed (`pip install "jlora[lift]"`).
        ValueError: an operation that needs the whole weight (with the path and its name); when it
            is called.

    Cost: of fn, and 2 t r (m + n) flops for each product of t rows. The delta itself is not made.

    Accuracy: as `apply_factors`; products keep the precision that fn asks for.

    Gradients: exact, to the factors and the base; with `columns`, zero to the columns before them.

    Source: built on quax's array values (Kidger, 2023).

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> model = jlora.lift(lambda params, x: x @ params["w"])
        >>> model(adapted, jnp.ones((2, 4))).round()[0].tolist()
        [4.0, 4.0, 4.0]
    """
    _require_quax()

    @functools.wraps(fn, updated=())
    def run(*args, **kwargs):
        return _run_lifted(fn, args, kwargs, materialize)

    return run


def _require_quax():
    if importlib.util.find_spec("quax") is None:
        raise ImportError(
            "`lift` must have quax to run on, got an environment without it. "
            'Install it with pip install "jlora[lift]", or use jlora.on_merged.'
        )


def _run_lifted(fn, args, kwargs, materialize):
    # Imported where it is used: importing jlora loads none of the extras.
    from jlora.lifting import rules_layout, rules_products  # noqa: F401
    from jlora.lifting.rules_calls import run_program

    # An Equinox module is a tree itself, and may be the function.
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        (fn, args, kwargs), is_leaf=is_adapted
    )
    at = [i for i, (_, leaf) in enumerate(leaves) if _is_array(leaf)]
    plain = [leaf for _, leaf in leaves]

    def call(*arrays):
        filled = list(plain)
        for i, array in zip(at, arrays, strict=True):
            filled[i] = array
        function, args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    shapes = [_describe(plain[i]) for i in at]
    program, result = jax.make_jaxpr(call, return_shape=True)(*shapes)
    lifted = [_lift_leaf(*leaves[i], materialize) for i in at]
    return jax.tree.unflatten(jax.tree.structure(result), run_program(program, lifted))


def _is_array(leaf):
    return is_adapted(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _describe(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_adapted(leaf) else leaf


def _name_leaf(path):
    """Return the path inside its argument of a leaf of (fn, args, kwargs)."""
    inside = path[2:] if path[0] == jax.tree_util.SequenceKey(1) else path[1:]
    return format_path(inside) or f"argument {path[1].idx}"


def _lift_leaf(path, leaf, materialize):
    if not is_adapted(leaf):
        return leaf
    from jlora.lifting.lifted_weight import LiftedWeight

    u, v = leaf.factors
    u = u * jnp.asarray(leaf.scale, u.dtype)
    if leaf.num_columns is not None and leaf.num_columns < v.shape[-1]:
        fixed, trained = v[..., : -leaf.num_columns], v[..., -leaf.num_columns :]
        v = jnp.concatenate([jax.lax.stop_gradient(fixed), trained], axis=-1)
    batch, inputs, outputs = split_shape(leaf.shape, leaf.layout)
    rank = u.shape[-1]
    return LiftedWeight(
        leaf.base,
        u.reshape(*batch, *inputs, rank),
        v.reshape(*batch, rank, *outputs),
        complete_layout(leaf.layout, leaf.ndim),
        _name_leaf(path),
        np.dtype(leaf.dtype),
        materialize,
    )


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
