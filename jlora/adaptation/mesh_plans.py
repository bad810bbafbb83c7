"""Which weights of a plan are decomposed in which way on a mesh, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.adaptation.costs import (
    DeviceRates,
    GroupCost,
    MatrixGroup,
    choose_parallel,
    estimate_cost,
)
from jlora.adaptation.placements import Entries, view_entries
from jlora.adaptation.rule import Rule
from jlora.adaptation.tables import format_table
from jlora.layouts import matrix_shape


class WeightOnMesh(NamedTuple):
    """One weight of a plan, and its place on the mesh."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    rule: Rule
    entries: Entries | None  # of its sharding; None: it is not on the mesh


class ChosenWay(NamedTuple):
    """The way of a group of weights, and its cost."""

    weights: list[WeightOnMesh]
    group: MatrixGroup
    cost: GroupCost


def check_mesh(mesh: Any) -> None:
    """Refuse a mesh that is none."""
    if not hasattr(mesh, "axis_names") or not hasattr(mesh, "shape"):
        raise TypeError(
            f"`mesh` must be a mesh of JAX, got {type(mesh).__name__}. Make one with "
            "jax.make_mesh."
        )


def choose_ways(
    weights: Iterable[WeightOnMesh], mesh: Mesh | Any, rates: DeviceRates
) -> list[ChosenWay]:
    """Return the way of each group of weights with one shape, rule and sharding."""
    groups: dict[tuple, list[WeightOnMesh]] = {}
    for weight in weights:
        rule = weight.rule
        key = (
            *matrix_shape(weight.shape, rule.layout)[-2:],
            jnp.dtype(weight.dtype),
            rule.rank,
            rule.initializer,
            rule.parallel,
            None if weight.entries is None else _view(weight),
            len(weight.shape) > len(rule.layout.lstrip("b")),
        )
        groups.setdefault(key, []).append(weight)
    return [_choose(members, mesh, rates) for members in groups.values()]


def _view(weight: WeightOnMesh) -> tuple:
    assert weight.entries is not None
    return view_entries(weight.entries, weight.rule.layout)


def _choose(weights: list[WeightOnMesh], mesh: Any, rates: DeviceRates) -> ChosenWay:
    group = _describe(weights, mesh)
    forced = weights[0].rule.parallel
    if forced is not None:
        _check_forced(forced, weights[0], group)
    parallel = forced or choose_parallel(group, rates)
    return ChosenWay(weights, group, estimate_cost(group, parallel, rates))


def _describe(weights: list[WeightOnMesh], mesh: Any) -> MatrixGroup:
    first = weights[0]
    rule = first.rule
    *_, m, n = matrix_shape(first.shape, rule.layout)
    sizes: Mapping[str, int] = mesh.shape
    batch_shards = num_shards = 1
    if first.entries is not None:
        own = view_entries(first.entries, rule.layout)
        num_all = count_shards(first.entries, sizes)
        batch_shards = count_shards(own.batch, sizes)
        num_shards = num_all // batch_shards
    num_matrices = sum(math.prod(w.shape) // (m * n) for w in weights)
    assert isinstance(rule.rank, int)
    return MatrixGroup(
        m,
        n,
        jnp.dtype(first.dtype),
        num_matrices,
        rule.rank,
        rule.initializer.decomposition,
        mesh.size,
        num_shards,
        batch_shards > 1,
    )


def count_shards(entries: Iterable[Any], sizes: Mapping[str, int]) -> int:
    """Return over how many devices the entries of a PartitionSpec split an array."""
    num = 1
    for entry in entries:
        names = entry if isinstance(entry, tuple) else (entry,)
        num *= math.prod(sizes[name] for name in names if name is not None)
    return num


def _check_forced(forced: str, weight: WeightOnMesh, group: MatrixGroup) -> None:
    if forced == "layers" and group.num_shards > 1:
        raise ValueError(
            f"{weight.path}: `parallel` must be 'exchange' or 'matrix' for matrices "
            f"that are sharded themselves ({group.num_shards} shards), got 'layers'. "
            "Change it, or leave it out."
        )
    if forced == "matrix" and group.is_stack_sharded:
        raise ValueError(
            f"{weight.path}: `parallel` must be 'layers' or 'exchange' for a stack "
            "that is sharded along its batch axes, got 'matrix'. Change it, or leave "
            "it out."
        )


def format_ways(ways: list[ChosenWay], mesh: Any, rates: DeviceRates) -> list[str]:
    """Return the lines of a table of the ways and of their cost for each device."""
    head = ("matrices", "m×n", "dtype", "rank", "shards", "parallel", "flops")
    rows: list[tuple[str, ...]] = [(*head, "bytes moved", "memory", "time")]
    for _, group, cost in ways:
        rows.append(
            (
                str(group.num_matrices),
                f"{group.m}×{group.n}",
                group.dtype.name,
                str(group.rank),
                str(group.num_shards),
                cost.parallel,
                f"{cost.flops:.3g}",
                f"{cost.num_bytes:.3g}",
                f"{cost.memory:.3g}",
                f"{1e3 * cost.seconds:.3g} ms",
            )
        )
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    total = sum(cost.seconds for _, _, cost in ways)
    return [
        f"on a mesh of {mesh.size} devices ({sizes}), for each device:",
        *format_table(rows),
        f"{1e3 * total:.3g} ms at the peak rates of {rates.name}: "
        f"{rates.flops:.3g} flops, {rates.memory:.3g} bytes of memory and "
        f"{rates.link:.3g} bytes of links a second",
    ]
