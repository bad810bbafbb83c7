"""Meshes of the eight devices of the tests, and arrays on them."""

import contextlib

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(kind="automatic", sizes=(2, 4), names=("data", "model")):
    """Return a mesh whose axes are all of one kind, or of the kinds in a tuple."""
    kinds = (kind,) * len(sizes) if isinstance(kind, str) else kind
    return jax.make_mesh(sizes, names, axis_types=tuple(KINDS[each] for each in kinds))


def put(array, mesh, *entries):
    """Return the array on a mesh, sharded by the entries of a PartitionSpec."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*entries)))


def enter(mesh):
    """Return the context in which programs on the mesh run."""
    is_explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext()


def list_entries(array):
    """Return the entry of each axis in the sharding of an array."""
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def assert_close(found, expected, tolerance):
    """Compare trees of arrays; the tolerance is relative to the largest entry."""
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        other = np.asarray(other, np.float64)
        atol = tolerance * max(np.abs(other).max(initial=0), 1e-30)
        np.testing.assert_allclose(np.asarray(one, np.float64), other, 0, atol)
