"""The work of `adapt`: a `WeightTask` for each weight, a `MatrixRef` in each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _checks
from jlora._types import Array, PRNGKey, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.data import find_data
from jlora.adaptation.lazy_arrays import LazyArray
from jlora.adaptation.paths import fold_path, list_leaves
from jlora.adaptation.plan import Plan, PlanEntry
from jlora.adaptation.programs import InitSpec, has_new_base
from jlora.layouts import complete_layout, list_axes, view_matrix
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import is_registered


class WeightTask(NamedTuple):
    """One weight of the plan."""

    entry: PlanEntry
    leaf: Any  # as in the tree
    data: Any  # array of matrices, or None
    key: PRNGKey  # folded with the path
    spec: InitSpec
    batch_axes: tuple[int, ...]
    has_new_base: bool  # whether the initializer gives another base than the weight
    donate: bool

    @property
    def is_traced(self) -> bool:
        parts = jax.tree.leaves((self.leaf, self.data, self.key))
        return any(isinstance(part, Tracer) for part in parts)

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(self.entry.shape[axis] for axis in self.batch_axes)

    @property
    def num_matrices(self) -> int:
        return math.prod(self.batch)

    @property
    def matrix_axes(self) -> tuple[int, ...]:
        axes = range(len(self.entry.shape))
        return tuple(axis for axis in axes if axis not in self.batch_axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of one stored matrix."""
        return tuple(self.entry.shape[axis] for axis in self.matrix_axes)


class MatrixRef(NamedTuple):
    """One matrix to decompose: a weight, or one of a stack."""

    task: WeightTask
    index: int  # in the flattened stack

    @property
    def key(self) -> PRNGKey:
        if not self.task.batch:
            return self.task.key
        return jax.random.fold_in(self.task.key, self.index)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index of the matrix's first element in its leaf."""
        task = self.task
        indices = np.unravel_index(self.index, task.batch)
        by_axis = dict(zip(task.batch_axes, indices, strict=True))
        return tuple(int(by_axis.get(axis, 0)) for axis in range(len(task.entry.shape)))


def list_tasks(
    params: Tree, plan: Plan, data: dict[str, Any], key: PRNGKey, *, donate: bool
) -> list[WeightTask]:
    """Return the task of each planned weight, in the order of the plan."""
    weights = _find_weights(params, plan)
    if donate:
        _refuse_shared(params, weights)
    return [
        _make_task(entry, weights[entry.path], data, key, donate)
        for entry in plan.entries
    ]


def _find_weights(params: Tree, plan: Plan) -> dict[str, Any]:
    """Return {path: leaf} of the planned weights, checked."""
    planned = {entry.path: entry for entry in plan.entries}
    found = {}
    for path, leaf in list_leaves(params):
        if path in planned:
            found[path] = _check_leaf(leaf, planned[path])

    missing = [path for path in planned if path not in found]
    if missing:
        raise ValueError(
            "`params` must hold every path of the plan, got none at "
            f"{', '.join(missing)}. Make the plan from this tree."
        )
    return found


def _check_leaf(leaf: Any, entry: PlanEntry) -> Any:
    _checks.check_floating(leaf, entry.path)

    if tuple(leaf.shape) != entry.shape:
        raise ValueError(
            f"{entry.path}: `params` must have shape {entry.shape} here as in the "
            f"plan, got {tuple(leaf.shape)}. Make the plan from this tree."
        )

    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{entry.path}: `params` must hold arrays, got an abstract one. "
            "Pass the weights themselves; only make_plan takes shapes."
        )
    if is_concrete(leaf) and leaf.is_deleted():
        raise ValueError(
            f"{entry.path}: `params` must hold arrays that are still there, got one "
            "that was donated or deleted. Keep the result of the donating call, or do "
            "not donate."
        )
    return leaf


def is_concrete(leaf: Any) -> bool:
    """Return whether a leaf is a JAX array outside of a trace."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)


def _refuse_shared(params: Tree, weights: dict[str, Any]) -> None:
    """Refuse a weight that is the same array as another leaf, which would lose it."""
    seen: dict[int, str] = {}
    for path, leaf in list_leaves(params):
        other = seen.setdefault(id(leaf), path)
        if other == path or not isinstance(leaf, jax.Array):
            continue
        if path in weights or other in weights:
            raise ValueError(
                f"{path}: `params` must hold an array of its own here to donate, got "
                f"the same array at {other}. Give adapt a tree with one of them, or do "
                "not donate."
            )


def _make_task(
    entry: PlanEntry, leaf: Any, data: dict[str, Any], key: PRNGKey, donate: bool
) -> WeightTask:
    rule = entry.rule
    layout = complete_layout(rule.layout, len(entry.shape))
    spec = InitSpec(rule.initializer, entry.rank, layout.replace("b", ""), rule.format)
    found = find_data(entry.path, rule, data, entry.shape)
    if found is not None and rule.initializer.is_data_stored:
        found = view_matrix(found, layout)

    task = WeightTask(
        entry,
        leaf,
        found,
        fold_path(key, entry.path),
        spec,
        tuple(list_axes(layout, "b")),
        has_new_base=False,
        donate=False,
    )
    if rule.format is not None:
        _check_format(entry, leaf)
    if isinstance(leaf, QuantizedArray):
        _check_layout(entry, leaf)
    is_new = has_new_base(spec, task.matrix_shape, leaf.dtype, _describe_data(task))
    if is_new and is_registered(leaf) and not isinstance(leaf, LazyArray):
        raise ValueError(
            f"{entry.path}: `init` must leave a base of type {type(leaf).__name__} "
            f"unchanged, got {rule.initializer.label!r}. Use 'lora', or dequantise the "
            "weight first."
        )
    # Only an array of JAX can be donated, and only if a new base takes its buffer.
    donate = donate and is_new and isinstance(leaf, jax.Array)
    return task._replace(has_new_base=is_new, donate=donate)


def _check_layout(entry: PlanEntry, leaf: QuantizedArray) -> None:
    """Refuse a rule that reads a quantised weight in another layout than its own."""
    own, given = (
        complete_layout(layout, leaf.ndim)
        for layout in (leaf.layout, entry.rule.layout)
    )
    if own != given:
        raise ValueError(
            f"{entry.path}: `layout` must be {leaf.layout!r}, in which this weight was "
            f"quantised, got {entry.rule.layout!r}. Write it so in its rule."
        )


def _check_format(entry: PlanEntry, leaf: Any) -> None:
    """Refuse a weight that cannot be stored in the format of its rule."""
    label = entry.rule.format and entry.rule.format.label
    if is_registered(leaf) and not isinstance(leaf, LazyArray):
        raise ValueError(
            f"{entry.path}: `quantize` must be None for a weight of type "
            f"{type(leaf).__name__}, got {label}. Leave it out: the weight is the base."
        )
    if jnp.dtype(leaf.dtype).itemsize > 4:
        raise TypeError(
            f"{entry.path}: `params` must hold float32, bfloat16 or float16 for "
            f"quantize={label}, got {leaf.dtype}. Cast the weight first."
        )


def _describe_data(task: WeightTask) -> tuple[tuple[int, ...], Any] | None:
    """Return shape and dtype of one matrix's data."""
    if task.data is None:
        return None
    return tuple(task.data.shape[len(task.batch) :]), jnp.dtype(task.data.dtype)


def identify_program(task: WeightTask) -> tuple:
    """Return a key that tasks share if one compiled program does the work of both."""
    dtype = jnp.dtype(task.leaf.dtype)
    return task.spec, task.matrix_shape, dtype, _describe_data(task), task.donate


def take_data(ref: MatrixRef) -> Array | None:
    """Return the data of one matrix, on the device."""
    data = ref.task.data
    if data is None:
        return None
    num_batch = len(ref.task.batch)
    return jnp.asarray(data.reshape(-1, *data.shape[num_batch:])[ref.index])


def make_weight(
    task: WeightTask, base: Any, u: Array, v: Array, core: Array | None
) -> AdaptedWeight:
    """Return the adapted weight of a task from its arrays, batch axes in front."""
    rule, shape = task.entry.rule, task.entry.shape
    is_plain = rule.layout.lstrip("b") == "io"

    return AdaptedWeight(
        base if rule.initializer.keeps_residual else None,
        u,
        v,
        jnp.asarray(rule.scale, u.dtype),
        rule.trainable or "v",
        rule.num_columns,
        jnp.dtype(task.leaf.dtype),
        _complete_core(rule.trainable, u, core),
        rule.layout,
        None if is_plain else shape[-len(rule.layout) :],
    )


def _complete_core(trainable: str | None, u: Array, core: Array | None) -> Array | None:
    """Return the core, or the identity if a core is trained and none was given."""
    if core is not None or trainable not in ("core", "s"):
        return core
    *batch, _, rank = u.shape
    identity = jnp.ones(rank, u.dtype)
    if trainable == "core":
        identity = jnp.eye(rank, dtype=u.dtype)
    return jnp.broadcast_to(identity, (*batch, *identity.shape))
