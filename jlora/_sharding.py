"""Arrays on a mesh: explicit axes inside kernels, loop carries inside `shard_map`.

On a mesh with explicit axes a sharding is part of an array's type, and JAX refuses a
product whose contracted axis is sharded. A kernel runs on automatic axes instead: JAX's
partitioner places the inner arrays, and `follow_axes` states the sharding of the
result. A mesh with automatic axes needs nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jlora._types import Array, Tree

Parameters = ParamSpec("Parameters")
ResultT = TypeVar("ResultT")

# The axes of an array in words, "*batch m n", which also stand for all arrays of a
# tree; a tuple of such texts for a tuple. None for keys and scalars.
Axes: TypeAlias = Any
_Names: TypeAlias = dict[str, Any]  # the entry of a PartitionSpec for each axis


def follow_axes(
    *arguments: Axes, result: Axes
) -> Callable[[Callable[Parameters, ResultT]], Callable[Parameters, ResultT]]:
    """Return a decorator that gives a result the explicit sharding of its arguments.

    An axis of the result is sharded as the first argument that has an axis of the same
    name and shards it. Axes of other names, and those that the mesh does not divide,
    are whole. A mesh axis shards only the first of two axes.

    Args:
        *arguments: the axes of the leading positional arguments, which are arrays or
            trees of arrays. Further arguments are static.
        result: the axes of the result.
    """

    def decorate(
        function: Callable[Parameters, ResultT],
    ) -> Callable[Parameters, ResultT]:
        @functools.wraps(function)
        def run(*given: Parameters.args, **settings: Parameters.kwargs) -> ResultT:
            arrays, static = given[: len(arguments)], given[len(arguments) :]
            mesh = find_explicit_mesh(arrays)
            if mesh is None:
                return function(*given, **settings)

            def run_arrays(*arrays: Any) -> ResultT:
                return function(*arrays, *static, **settings)

            run_automatic: Any = functools.partial(
                jax.sharding.auto_axes, run_arrays, axes=mesh.explicit_axes
            )
            whole = NamedSharding(mesh, PartitionSpec())
            shapes = jax.eval_shape(run_automatic(out_sharding=whole), *arrays)
            names = _find_entries(arguments, arrays)
            placed = _place(result, shapes, names, mesh)
            return run_automatic(out_sharding=placed)(*arrays)

        return run

    return decorate


def is_sharded(array: Any) -> bool:
    """Return whether an array lies on several devices.

    False for a traced one on automatic axes, whose sharding is not known.
    """
    if not isinstance(array, jax.Array):
        return False
    if find_explicit_mesh(array) is not None:
        return any(entry is not None for entry in jax.typeof(array).sharding.spec)
    if isinstance(array, Tracer):
        return False
    return len(array.sharding.device_set) > 1


def find_explicit_mesh(tree: Tree) -> Any:
    """Return the mesh with explicit axes that the arrays of a tree lie on, or None."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
            if mesh is not None and mesh.explicit_axes:
                return mesh
    return None


def _find_entries(arguments: tuple[Axes, ...], arrays: tuple[Tree, ...]) -> _Names:
    """Return {name of an axis: its entry in the PartitionSpec of an argument}."""
    found: _Names = {}
    for axes, tree in zip(arguments, arrays, strict=True):
        for text, array in _pair_leaves(axes, tree):
            for name, entry in _name_entries(text, array):
                if _is_whole(found.get(name)):
                    found[name] = entry
    return found


def _pair_leaves(axes: Axes, tree: Tree) -> Iterator[tuple[str, Array]]:
    """Yield the axes and the array of each leaf that has both."""
    if isinstance(axes, str):
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, jax.Array):
                yield axes, leaf
    elif axes is not None and tree is not None:
        for part, leaf in zip(axes, tree, strict=True):
            yield from _pair_leaves(part, leaf)


def _name_entries(text: str, array: Array) -> Iterator[tuple[str, Any]]:
    """Yield (name, entry) of the axes of an array; a batch has a tuple of entries."""
    spec = jax.typeof(array).sharding.spec
    entries = (*spec, *(None,) * (array.ndim - len(spec)))
    names = text.split()
    if array.ndim < len(names) - 1:
        return
    if names[0].startswith("*"):
        num_batch = array.ndim - len(names) + 1
        yield names[0], tuple(entries[:num_batch])
        names, entries = names[1:], entries[num_batch:]
    yield from zip(names, entries, strict=False)


def _is_whole(entry: Any) -> bool:
    """Return whether an entry, or each entry of a batch, shards nothing."""
    if isinstance(entry, tuple):
        return all(part is None for part in entry)
    return entry is None


def _place(axes: Axes, shapes: Any, names: _Names, mesh: Any) -> Any:
    """Return the shardings of a result, a tree as its shapes."""
    texts = jax.tree.broadcast(axes, shapes, is_leaf=lambda part: part is None)
    return jax.tree.map(
        lambda shape, text: place_axes(text, shape.shape, names, mesh), shapes, texts
    )


def place_axes(
    text: str, shape: tuple[int, ...], names: dict[str, Any], mesh: Any
) -> NamedSharding:
    """Return the sharding of an array, see `follow_axes`.

    Args:
        text: the names of its axes.
        shape: of the array.
        names: the entry of a PartitionSpec for each name.
        mesh: the mesh.
    """
    entries: list[Any] = []
    for name in text.split():
        found = names.get(name)
        entries += found or () if name.startswith("*") else [found]
    if len(entries) != len(shape):
        entries = []
    kept = _keep_dividing(entries, shape, mesh)
    return NamedSharding(mesh, PartitionSpec(*_drop_repeated(kept)))


def _keep_dividing(
    entries: list[Any], shape: tuple[int, ...], mesh: Any
) -> Iterator[Any]:
    """Yield the entries, and None for an axis that their devices do not divide."""
    for entry, size in zip(entries, shape, strict=False):
        own = entry if isinstance(entry, tuple) else (entry,)
        num_shards = math.prod(mesh.shape[name] for name in own if name is not None)
        yield entry if size % num_shards == 0 else None


def _drop_repeated(entries: Iterator[Any]) -> Iterator[Any]:
    """Yield the entries, and None for those with a mesh axis of an earlier entry."""
    seen: set[Any] = set()
    for entry in entries:
        own = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        yield None if seen & own else entry
        seen |= own


def vary_as(tree: ResultT, like: Tree) -> ResultT:
    """Return constants that start a loop, marked as varying over devices as `like`.

    Inside `jax.shard_map` a carry that starts the same on all devices and differs
    after a step is refused. Elsewhere nothing changes.
    """
    arrays = [leaf for leaf in jax.tree.leaves(like) if isinstance(leaf, jax.Array)]
    axes = frozenset().union(*map(_find_varying, arrays))

    def mark(array: Array) -> Array:
        missing = tuple(axes - _find_varying(array))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree) if axes else tree


def _find_varying(array: Array) -> frozenset[str]:
    """Return the mesh axes over which an array differs, inside `jax.shard_map`."""
    return jax.typeof(array).manual_axis_type.varying
