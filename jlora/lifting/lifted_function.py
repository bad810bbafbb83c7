"""Unmodified functions of plain weights, run on adapted ones."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jlora._types import Tree
from jlora.adaptation.adapted_weight import is_adapted
from jlora.adaptation.merging import merge
from jlora.adaptation.paths import format_path

Result = TypeVar("Result")


def lift(
    fn: Callable[..., Result], *, materialize: bool = False
) -> Callable[..., Result]:
    """Return `fn` as a function of adapted weights that never builds a delta.

    Wherever a weight meets a product (x @ w, einsum, dot_general in any orientation), a
    lookup or a convolution, the thin factors are applied beside the base. On the way a
    weight may be cast, transposed, reshaped, sliced, split, scaled by a number, taken
    from a stack or scanned over, under jit, grad, vmap and remat, inside `fn` or around
    it. The docstring of `jlora.lifting` lists all operations with a rule.

    Three ways to run a model on an adapted tree:

    - `x @ w`, which is `linear(x, w)`: if the model only multiplies by its weights.
    - `lift`: for any other model that you do not want to change.
    - `on_merged`: if the model needs full weights, such as their norms. Each call
      builds all of them.

    Args:
        fn: function of pytrees of arrays that JAX can trace: of a dict of weights, with
            flax.linen `module.apply`, with flax.nnx
            `lambda state, x: nnx.merge(graph, state)(x)`, or an Equinox module. It gets
            leaves that are no arrays unchanged.
        materialize: static; whether to build the full weight for an operation that has
            no rule. False: raise there.

    Returns:
        The function; an `AdaptedWeight` may stand in any argument in place of an array.
        Put jax.jit around it: run eagerly, it traces `fn` in each call.

    Raises:
        ImportError: quax is not installed (`pip install "jlora[lift]"`).
        ValueError: in a call, for an operation that needs the full weight; the message
            has the path of the weight and the name of the operation.

    Cost: the cost of `fn`, and 2 t r (m + n) flops for each product of t rows.

    Accuracy: as `apply_factors`; products keep the precision that `fn` asks for.

    Gradients: exact, to the factors and the base. With `num_columns`, zero to the
    columns of v before the trained ones.

    Source: built on the array values of quax (Kidger, 2023).

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
    def run_lifted(*args: Any, **kwargs: Any) -> Result:
        return _run_lifted(fn, args, kwargs, can_materialize=materialize)

    return run_lifted


def on_merged(fn: Callable[..., Result]) -> Callable[..., Result]:
    """Return `fn(params, ...)` as a function of the adapted tree that merges it first.

    It works for any function. Each call builds every adapted weight, and so does its
    gradient; `lift` avoids that.

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
    def run_merged(adapted: Tree, *args: Any, **kwargs: Any) -> Result:
        return fn(merge(adapted), *args, **kwargs)

    return run_merged


def _require_quax() -> None:
    if importlib.util.find_spec("quax") is None:
        raise ImportError(
            "`lift` must have quax to run on, got an environment without it. "
            'Install it with pip install "jlora[lift]", or use jlora.on_merged.'
        )


def _run_lifted(
    fn: Callable[..., Result],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    can_materialize: bool,
) -> Result:
    # Imported in the call: importing jlora loads none of the extras.
    from jlora.lifting.lifted_weight import lift_weight
    from jlora.lifting.programs import run_program

    # Flatten fn too: an Equinox module is a function and a tree of weights.
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        (fn, args, kwargs), is_leaf=is_adapted
    )
    values = [leaf for _, leaf in leaves]
    array_indices = [index for index, leaf in enumerate(values) if _is_array(leaf)]

    def call(*arrays: jax.Array) -> Result:
        filled = list(values)
        for index, array in zip(array_indices, arrays, strict=True):
            filled[index] = array
        function, args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    # Trace fn with plain arrays of the shapes of the weights.
    shapes = [_to_plain_shape(values[index]) for index in array_indices]
    program, result = jax.make_jaxpr(call, return_shape=True)(*shapes)

    # Run the program with the weights in place of the arrays.
    inputs = []
    for index in array_indices:
        path, leaf = leaves[index]
        if is_adapted(leaf):
            name = _name_argument(path)
            leaf = lift_weight(leaf, name, can_materialize=can_materialize)
        inputs.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(result), run_program(program, inputs))


def _is_array(leaf: Any) -> bool:
    return is_adapted(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _to_plain_shape(leaf: Any) -> Any:
    """Return the shape and dtype of an adapted weight, or the plain array itself."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_adapted(leaf) else leaf


def _name_argument(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf of (fn, args, kwargs), counted from its argument."""
    is_positional = path[0] == jax.tree_util.SequenceKey(1)
    inside = path[2:] if is_positional else path[1:]
    return format_path(inside) or f"argument {path[1].idx}"
