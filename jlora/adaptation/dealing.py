"""The compiled programs of `adapt` on a mesh, on which each device has whole matrices.

Matrices are stacked, and dealt out over all devices of the mesh along the new axis. In
`jax.shard_map` each device decomposes its own, one after another, without a collective.
Matrices that were sharded are made whole by one all-to-all on the way in, and the
results are sharded again by another one on the way out.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora._types import Array, PRNGKey, Scalar
from jlora.adaptation.placements import Placement, place_weight
from jlora.adaptation.programs import (
    InitializedMatrix,
    InitSpec,
    initialize_matrix,
    split_results,
    stack_rows,
)
from jlora.layouts import complete_layout, invert_permutation, list_axes


def deal_matrices(
    stack: Array,
    scales: Array,
    keys: Array,
    datas: Array | None,
    *,
    spec: InitSpec,
    mesh: Mesh,
) -> InitializedMatrix:
    """Return the results of stacked matrices, dealt out over the devices of a mesh.

    Args:
        stack: stored matrices, as many as a multiple of the number of devices.
        scales, keys, datas: one for each matrix.
        spec: static.
        mesh: static, with automatic axes.
    """
    dealt = PartitionSpec(mesh.axis_names)

    def initialize_own(
        ws: Array, scales: Array, keys: Array, datas: Array | None
    ) -> InitializedMatrix:
        def initialize(row: tuple) -> InitializedMatrix:
            return initialize_matrix(*row, spec=spec)

        rows = ws, scales, keys, datas
        if len(ws) == 1:
            one = initialize(jax.tree.map(lambda array: array[0], rows))
            return jax.tree.map(lambda array: array[None], one)
        return jax.lax.map(initialize, rows)

    # Initializers of users may start their loops with constants, which check_vma
    # refuses.
    run = jax.shard_map(
        initialize_own, mesh=mesh, in_specs=dealt, out_specs=dealt, check_vma=False
    )
    return run(stack, scales, keys, datas)


@functools.lru_cache(maxsize=256)
def compile_dealt_chunk(spec: InitSpec, placement: Placement, *, donate: bool) -> Any:
    """Return the program for a chunk of matrices that are leaves of the tree.

    It takes and returns what `initialize_chunk` does.
    """
    mesh, entries, _ = placement

    def run(
        ws: tuple[Array, ...],
        scales: tuple[Scalar, ...],
        keys: tuple[PRNGKey, ...],
        datas: tuple[Array | None, ...],
    ) -> tuple[InitializedMatrix, ...]:
        stacked = stack_rows(ws, scales, keys, datas)
        found = deal_matrices(*stacked, spec=spec, mesh=mesh)
        if entries is not None:
            # Shard the matrices again before the stack is split, not afterwards.
            layout = "b" + spec.layout
            placed = place_weight(mesh, (None, *entries), layout, found)
            found = jax.lax.with_sharding_constraint(found, placed)
        return split_results(found, len(ws))

    return jax.jit(run, donate_argnums=(0,) if donate else ())


@functools.lru_cache(maxsize=256)
def compile_dealt_stack(
    spec: InitSpec, placement: Placement, layout: str, *, donate: bool
) -> Any:
    """Return the program for a stacked leaf of the tree.

    It returns `InitializedMatrix` with the batch axes of the leaf in front, and a plain
    base as the leaf is stored.
    """
    mesh, entries, _ = placement

    def run(
        leaf: Array, scale: Scalar, keys: Array, data: Array | None
    ) -> InitializedMatrix:
        complete = complete_layout(layout, leaf.ndim)
        batch_axes = list_axes(complete, "b")
        matrix_axes = sorted(list_axes(complete, "io"))
        order = (*batch_axes, *matrix_axes)
        moved = leaf.transpose(order)
        batch = moved.shape[: len(batch_axes)]

        # Fill up to a multiple of the devices, with zeros.
        stack = moved.reshape(-1, *moved.shape[len(batch) :])
        num = len(stack)
        missing = -num % mesh.size
        stack = _append_rows(stack, missing)
        data = None if data is None else _append_rows(data, missing)
        keys = jnp.concatenate([keys, keys[:1].repeat(missing)]) if missing else keys
        scales = jnp.broadcast_to(scale, len(stack))
        found = deal_matrices(stack, scales, keys, data, spec=spec, mesh=mesh)

        def restore(array: Array) -> Array:
            return array[:num].reshape(*batch, *array.shape[1:])

        found = jax.tree.map(restore, found)
        if isinstance(found.base, jax.Array):
            base = found.base.transpose(invert_permutation(order))
            found = found._replace(base=base)
        if entries is None:
            return found
        placed = place_weight(mesh, entries, layout, found)
        return jax.lax.with_sharding_constraint(found, placed)

    return jax.jit(run, donate_argnums=(0,) if donate else ())


def _append_rows(array: Array, num: int) -> Array:
    if not num:
        return array
    return jnp.pad(array, [(0, num), *[(0, 0)] * (array.ndim - 1)])


def run_dealt_chunk(
    ws: tuple[Any, ...],
    scales: tuple[Scalar, ...],
    keys: tuple[PRNGKey, ...],
    datas: tuple[Array | None, ...],
    *,
    spec: InitSpec,
    mesh: Mesh,
) -> tuple[InitializedMatrix, ...]:
    """Return what `initialize_chunk` does, for matrices that are not on the mesh.

    They are sent to the devices of the mesh. The results return to the device of the
    matrices, by way of the host, so that they are bound to a device only if these were.
    """
    rows = zip(ws, scales, keys, datas, strict=True)
    dealt = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def send(*arrays: Any) -> Array:
        is_on_host = isinstance(arrays[0], np.ndarray)
        return jax.device_put((np if is_on_host else jnp).stack(arrays), dealt)

    with jax.set_mesh(mesh):
        found = _deal(*jax.tree.map(send, *rows), spec=spec, mesh=mesh)
    device = ws[0].sharding if getattr(ws[0], "committed", False) else None
    results = split_results(jax.device_get(found), len(ws))
    return jax.device_put(results, device)


_deal = jax.jit(deal_matrices, static_argnames=("spec", "mesh"))
