"""The weights of `adapt` that are decomposed on a mesh, in groups of one program."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._numerics import compute_dtype
from jlora._processes import check_same
from jlora._progress import Progress
from jlora._types import PRNGKey
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.chunks import adapt_group, refuse_nonfinite
from jlora.adaptation.costs import find_device_rates
from jlora.adaptation.dealing import (
    compile_dealt_chunk,
    compile_dealt_stack,
    run_dealt_chunk,
)
from jlora.adaptation.mesh_plans import WeightOnMesh, check_mesh, choose_ways
from jlora.adaptation.placements import (
    Placement,
    find_sharding,
    list_entries,
    make_automatic,
    make_automatic_mesh,
    place_weight,
)
from jlora.adaptation.plan import Plan
from jlora.adaptation.programs import InitializedMatrix
from jlora.adaptation.tasks import (
    MatrixRef,
    WeightTask,
    identify_program,
    make_weight,
)
from jlora.adaptation.weight_builder import restore_quantized
from jlora.quantization.quantized_array import QuantizedArray


class MeshGroup(NamedTuple):
    """Tasks that share a program and a placement."""

    tasks: list[WeightTask]  # whose leaves have automatic axes
    placement: Placement
    originals: list[Any]  # the leaves of the tree


def group_tasks(
    tasks: list[WeightTask], mesh: Mesh | None
) -> tuple[list[list[WeightTask]], list[MeshGroup]]:
    """Return the tasks of one device, and those of a mesh, in groups of one program.

    `mesh` is for weights that lie on none.
    """
    if mesh is not None:
        check_mesh(mesh)
        mesh = make_automatic_mesh(mesh) if mesh.size > 1 else None
    of_device: dict[tuple, list[WeightTask]] = {}
    of_mesh: dict[Mesh, list[WeightTask]] = {}
    for task in tasks:
        own = _find_mesh(task, mesh)
        if own is None:
            of_device.setdefault(identify_program(task), []).append(task)
        else:
            of_mesh.setdefault(own, []).append(task)
    _check_one_set_of_devices(of_mesh)
    groups = [
        group for own, members in of_mesh.items() for group in _split(members, own)
    ]
    return list(of_device.values()), groups


def _find_mesh(task: WeightTask, mesh: Mesh | None) -> Mesh | None:
    sharding = find_sharding(task.leaf)
    if sharding is not None:
        return make_automatic_mesh(sharding.mesh)
    return mesh


def _check_one_set_of_devices(of_mesh: dict[Mesh, list[WeightTask]]) -> None:
    first = next(iter(of_mesh), None)
    for other in of_mesh:
        assert first is not None
        if set(other.devices.flat) != set(first.devices.flat):
            paths = [of_mesh[mesh][0].entry.path for mesh in (first, other)]
            raise ValueError(
                f"{paths[1]}: `params` must lie on meshes of the same devices, got "
                f"another set than at {paths[0]}. Move one with jax.device_put."
            )


def _split(tasks: list[WeightTask], mesh: Mesh) -> list[MeshGroup]:
    """Return the groups of the tasks of one mesh."""
    by_path = {task.entry.path: task for task in tasks}
    weights = [_describe(task) for task in tasks]
    groups: dict[tuple, list[WeightTask]] = {}
    for way in choose_ways(weights, mesh, find_device_rates(mesh)):
        for weight in way.weights:
            task = by_path[weight.path]
            placement = Placement(mesh, weight.entries, way.cost.parallel)
            key = (identify_program(task), placement, bool(task.batch))
            groups.setdefault(key, []).append(task)

    return [
        MeshGroup(
            [_make_automatic(task) for task in members],
            placement,
            [task.leaf for task in members],
        )
        for (_, placement, _), members in groups.items()
    ]


def _describe(task: WeightTask) -> WeightOnMesh:
    sharding, entry = find_sharding(task.leaf), task.entry
    entries = None if sharding is None else list_entries(sharding, len(entry.shape))
    return WeightOnMesh(
        entry.path, entry.shape, jnp.dtype(task.leaf.dtype), entry.rule, entries
    )


def _make_automatic(task: WeightTask) -> WeightTask:
    """Return the task with its arrays on automatic axes."""
    # A key, too: under jax.set_mesh it lies on the mesh.
    leaf, data, key = map(make_automatic, (task.leaf, task.data, task.key))
    return task._replace(leaf=leaf, data=data, key=key)


def check_agreement(groups: list[MeshGroup], plan: Plan, key: PRNGKey) -> None:
    """Refuse a plan or a key that differs between the processes of a mesh."""
    devices = [d for group in groups for d in group.placement.mesh.devices.flat]
    if len({device.process_index for device in devices}) > 1:
        check_same(plan, "plan", "Make it from the same rules everywhere.")
        check_same(key, "key")


def adapt_mesh_group(
    group: MeshGroup, size: int, bar: Progress
) -> dict[str, AdaptedWeight]:
    """Return {path: AdaptedWeight} of the tasks of a group.

    `size` is the most matrices that a device decomposes at a time.
    """
    tasks, placement, originals = group
    if placement.entries is None:
        run = functools.partial(
            run_dealt_chunk, spec=tasks[0].spec, mesh=placement.mesh
        )
        return adapt_group(tasks, size * placement.mesh.size, bar, run)

    # The programs have automatic axes, also where the caller works with explicit ones.
    with jax.set_mesh(placement.mesh):
        adapted = _run_group(tasks, placement, size, bar)
    for task, original in zip(tasks, originals, strict=True):
        path = task.entry.path
        is_unchanged = adapted[path].base is task.leaf
        adapted[path] = _place(adapted[path], original, is_unchanged=is_unchanged)
    return adapted


def _run_group(
    tasks: list[WeightTask], placement: Placement, size: int, bar: Progress
) -> dict[str, AdaptedWeight]:
    first = tasks[0]
    if placement.parallel == "matrix":
        return adapt_group(tasks, 1, bar)
    if first.batch:
        return {task.entry.path: _adapt_stack(task, placement, bar) for task in tasks}
    donate = first.donate and first.spec.format is None
    run = compile_dealt_chunk(first.spec, placement, donate=donate)
    return adapt_group(tasks, size * placement.mesh.size, bar, run)


def _adapt_stack(
    task: WeightTask, placement: Placement, bar: Progress
) -> AdaptedWeight:
    """Return the adapted weight of a stacked leaf, by one program for all of it."""
    rule, leaf, data = task.entry.rule, task.leaf, task.data
    donate = task.donate and task.spec.format is None
    run = compile_dealt_stack(task.spec, placement, rule.layout, donate=donate)
    refs = [MatrixRef(task, i) for i in range(task.num_matrices)]
    if data is not None:
        data = jnp.asarray(data)
        data = data.reshape(-1, *data.shape[len(task.batch) :])

    num_bytes = leaf.nbytes
    scale = jnp.asarray(rule.scale, compute_dtype(leaf.dtype))
    keys = jnp.stack([ref.key for ref in refs])
    found: InitializedMatrix = run(leaf, scale, keys, data)
    _check_finite(found.is_finite, refs)
    bar.advance(len(refs), num_bytes=num_bytes)

    base = leaf if found.base is None else found.base
    if isinstance(base, QuantizedArray) and task.spec.format is not None:
        base = restore_quantized(task, base)
        if task.donate:
            leaf.delete()
    return make_weight(task, base, found.u, found.v, found.core)


def _check_finite(is_finite: jax.Array, refs: list[MatrixRef]) -> None:
    """Refuse the first matrix with a result that is not finite."""
    # Computed on the devices: a process may not see all flags, but each one the result.
    first = int(jnp.argmin(is_finite.reshape(-1)))
    if not bool(jnp.all(is_finite)):
        refuse_nonfinite(refs[first])


def _place(
    weight: AdaptedWeight, original: Any, *, is_unchanged: bool
) -> AdaptedWeight:
    """Return an adapted weight whose arrays are sharded as the plain weight was."""
    sharding = find_sharding(original)
    assert sharding is not None
    arrays = InitializedMatrix(
        weight.base, weight.u, weight.v, weight.core, weight.scale
    )
    entries = list_entries(sharding, len(weight.shape))
    placed = place_weight(sharding.mesh, entries, weight.layout, arrays)
    base, u, v, core, _ = jax.tree.map(jax.device_put, arrays, placed)
    scale = jax.device_put(weight.scale, NamedSharding(sharding.mesh, PartitionSpec()))
    if is_unchanged:
        base = original
    elif isinstance(base, jax.Array):
        base = jax.device_put(base, sharding)
    return dataclasses.replace(weight, base=base, u=u, v=v, core=core, scale=scale)
