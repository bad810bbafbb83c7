"""Where the arrays of a weight lie on a mesh, before and after `adapt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora._sharding import place_axes
from jlora.layouts import complete_layout, list_axes

# How the matrices of a weight are decomposed on a mesh:
# "layers": every device decomposes whole matrices of its own.
# "exchange": the same, for matrices that are sharded themselves: one all-to-all makes
#     them whole, and another one returns the results.
# "matrix": each matrix stays sharded, and all devices work on it together.
PARALLEL = ("layers", "exchange", "matrix")

Entries = tuple[Any, ...]  # of a PartitionSpec, one for each axis


class Placement(NamedTuple):
    """A weight on a mesh, and how its matrices are decomposed."""

    mesh: Mesh  # with automatic axes
    # One entry for each axis of the leaf; None: the leaf is not on the mesh.
    entries: Entries | None
    parallel: str


class MatrixEntries(NamedTuple):
    """The entries of a PartitionSpec for a weight that is read as matrices."""

    batch: Entries
    m: Any
    n: Any


def find_sharding(leaf: Any) -> NamedSharding | None:
    """Return the sharding of an array on a mesh of several devices, or None."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
        return sharding
    return None


def list_entries(sharding: NamedSharding, ndim: int) -> Entries:
    """Return the entries of a sharding, one for each axis."""
    spec = tuple(sharding.spec)
    return spec + (None,) * (ndim - len(spec))


def make_automatic_mesh(mesh: Any) -> Mesh:
    """Return the mesh with automatic axes only."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def make_automatic(array: Any) -> Any:
    """Return the same array, on automatic axes if it lies on a mesh."""
    sharding = find_sharding(array)
    if sharding is None:
        return array
    mesh = make_automatic_mesh(sharding.mesh)
    if mesh == sharding.mesh:
        return array
    return jax.device_put(array, NamedSharding(mesh, sharding.spec))


def view_entries(entries: Sequence[Any], layout: str) -> MatrixEntries:
    """Return the entries of the matrix view of an array in a layout.

    Several input axes become one, which is sharded as the first of them; if another
    one is sharded too, it is whole.
    """
    layout = complete_layout(layout, len(entries))

    def join(kind: str) -> Any:
        first, *others = (entries[axis] for axis in list_axes(layout, kind))
        return first if all(entry is None for entry in others) else None

    batch = tuple(entries[axis] for axis in list_axes(layout, "b"))
    return MatrixEntries(batch, join("i"), join("o"))


class WeightShardings(NamedTuple):
    """The shardings of the arrays of an adapted weight, batch axes in front."""

    base: Any  # for a plain array one, for a quantised one a tree
    u: NamedSharding
    v: NamedSharding
    core: NamedSharding


def place_weight(mesh: Any, entries: Entries, layout: str, arrays: Any) -> Any:
    """Return the shardings of results, which follow the weight axis by axis.

    Args:
        mesh: the mesh of the weight.
        entries: of the stored weight.
        layout: of the weight.
        arrays: `InitializedMatrix` of arrays or shapes, batch axes in front; a plain
            base in the layout of the weight.

    Returns:
        A tree of shardings as `arrays`. The rank is never sharded.
    """
    own = view_entries(entries, layout)
    names = {"*b": own.batch, "m": own.m, "n": own.n}

    def place(text: str, tree: Any) -> Any:
        return jax.tree.map(
            lambda array: place_axes(text, array.shape, names, mesh), tree
        )

    is_plain = hasattr(arrays.base, "ndim") and not hasattr(arrays.base, "codes")
    base = place("*b n m", arrays.base)
    if is_plain:
        base = NamedSharding(mesh, PartitionSpec(*entries))
    return arrays._replace(
        base=base,
        u=place("*b m _", arrays.u),
        v=place("*b _ n", arrays.v),
        core=place("*b _ _" if _is_square(arrays) else "*b _", arrays.core),
        is_finite=place("*b", arrays.is_finite),
    )


def _is_square(arrays: Any) -> bool:
    return arrays.core is not None and arrays.core.ndim == arrays.u.ndim
