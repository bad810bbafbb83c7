"""Where the arrays of a checkpoint go when a sharded run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def replicate_others(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return a template in which every array lies on the mesh of the sharded ones.

    Counters of an optimiser begin on one device, and a step may take them anywhere.
    Restored there they are bound to that device, and no program takes them together
    with sharded arrays; with several processes each would have another device.

    Args:
        template: {name: array} of the state at the beginning.
    """
    shardings = (
        leaf.sharding for leaf in template.values() if isinstance(leaf, jax.Array)
    )
    meshes = [
        sharding.mesh
        for sharding in shardings
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1
    ]

    if not meshes:
        return dict(template)
    whole = NamedSharding(meshes[0], PartitionSpec())
    return {name: _place(leaf, whole) for name, leaf in template.items()}


def _place(leaf: Any, whole: NamedSharding) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.sharding.num_devices > 1:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
