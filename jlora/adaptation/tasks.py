"""What `adapt` has to do: a `WeightTask` for each weight, a `Matrix` for each matrix in it."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.paths import fold_path, list_leaves
from jlora.adaptation.plan import PlanEntry, check_data
from jlora.adaptation.programs import How
from jlora.initializers.from_weight import INITIALIZATIONS
from jlora.layouts import complete_layout, list_axes, view_matrix


class WeightTask(NamedTuple):
    """One weight of the plan."""

    entry: PlanEntry
    leaf: object
    data: object  # array or None
    key: jax.Array  # of its own
    how: How
    batch_axes: tuple[int, ...]
    donate: bool

    @property
    def is_traced(self):
        return any(
            isinstance(part, jax.core.Tracer)
            for part in (self.leaf, self.data, self.key)
        )

    @property
    def batch(self):
        return tuple(self.entry.shape[axis] for axis in self.batch_axes)

    @property
    def num_matrices(self):
        return math.prod(self.batch)

    @property
    def matrix_shape(self):
        """Shape of one matrix as it is stored."""
        kept = [
            axis for axis in range(len(self.entry.shape)) if axis not in self.batch_axes
        ]
        return tuple(self.entry.shape[axis] for axis in kept)


class Matrix(NamedTuple):
    """One matrix to decompose: a weight, or one of a stack."""

    job: WeightTask
    index: int  # in the stack, flat

    @property
    def key(self):
        return (
            jax.random.fold_in(self.job.key, self.index)
            if self.job.batch
            else self.job.key
        )

    @property
    def starts(self):
        """Where the matrix begins in its leaf, one index for each axis."""
        place = dict(
            zip(
                self.job.batch_axes,
                np.unravel_index(self.index, self.job.batch),
                strict=True,
            )
        )
        return tuple(
            int(place.get(axis, 0)) for axis in range(len(self.job.entry.shape))
        )


def find_weights(params, plan, *, donate):
    """Return {path: leaf} of the planned weights, checked."""
    planned = {entry.path: entry for entry in plan.entries}
    found = {
        path: _check_leaf(leaf, planned[path])
        for path, leaf in list_leaves(params)
        if path in planned
    }
    missing = [path for path in planned if path not in found]
    if missing:
        raise ValueError(
            f"`params` must hold every path of the plan, got none at {', '.join(missing)}. "
            "Make the plan from this tree."
        )
    if donate:
        _refuse_shared(found)
    return found


def _refuse_shared(weights):
    """Refuse one array at two paths: the first would use up the second's memory."""
    seen = {}
    for path, leaf in weights.items():
        if isinstance(leaf, jax.Array) and id(leaf) in seen:
            raise ValueError(
                f"{path}: `params` must hold an array of its own here to donate, got that at "
                f"{seen[id(leaf)]} too. Adapt one of them, or do not donate."
            )
        seen[id(leaf)] = path


def _check_leaf(leaf, entry):
    _checks.check_floating(leaf, entry.path)
    if tuple(leaf.shape) != entry.shape:
        raise ValueError(
            f"{entry.path}: `params` must have shape {entry.shape} here as in the plan, "
            f"got {tuple(leaf.shape)}. Make the plan from this tree."
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{entry.path}: `params` must hold arrays, got an abstract one. "
            "Pass the weights themselves; only make_plan takes shapes."
        )
    if (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.is_deleted()
    ):
        raise ValueError(
            f"{entry.path}: `params` must hold arrays that are still there, got one that was "
            "donated or deleted. Keep what the donating call returned, or do not donate."
        )
    return leaf


def make_task(entry, leaf, data, key, donate):
    rule, layout = entry.rule, complete_layout(entry.rule.layout, len(entry.shape))
    kind = INITIALIZATIONS[rule.init]
    moves_base = kind.moves_base and rule.residual
    how = How(
        rule.init,
        rule.rank,
        rule.quantize,
        rule.num_rounds,
        layout.replace("b", ""),
        moves_base,
    )
    batch_axes = tuple(list_axes(layout, "b"))
    found = check_data(entry.path, rule, data, entry.shape)
    if kind.data_is_stored:
        found = view_matrix(found, layout)
    # A host's array stays as it is, and a base that stays the same is the caller's own array.
    donate = donate and isinstance(leaf, jax.Array) and moves_base
    return WeightTask(
        entry, leaf, found, fold_path(key, entry.path), how, batch_axes, donate
    )


class Result:
    """What becomes of one weight: its matrices are taken out one by one, and their parts put in."""

    def __init__(self, job):
        self._job = job
        self._parts = [None] * job.num_matrices
        self._base = job.leaf
        if job.how.moves_base and job.batch and not job.donate:
            # Not the leaf: it is the caller's.
            self._base = _allocate_like(job.leaf)

    def take(self, matrix):
        """Return a matrix, on the device."""
        source = self._base if self._job.donate else self._job.leaf
        if not self._job.batch:
            return jnp.asarray(source)
        if isinstance(source, np.ndarray):
            return jnp.asarray(source[self._locate(matrix)])
        return _take_slice(source, matrix.starts, self._job.batch_axes)

    def put(self, matrix, base, u, v, core):
        """Keep the parts of a matrix; its base goes back to where it came from."""
        self._parts[matrix.index] = (u, v, core)
        if base is None:
            return
        is_on_host = isinstance(self._job.leaf, np.ndarray)
        if not self._job.batch:
            self._base = np.array(base, self._job.leaf.dtype) if is_on_host else base
        elif is_on_host:
            self._base[self._locate(matrix)] = base
        else:
            self._base = _put_slice(
                self._base, base, matrix.starts, self._job.batch_axes
            )

    def finish(self):
        """Return the AdaptedWeight."""
        parts = self._parts[0]
        if self._job.batch:
            parts = jax.tree.map(lambda *same: jnp.stack(same), *self._parts)
            parts = jax.tree.map(
                lambda a: a.reshape(*self._job.batch, *a.shape[1:]), parts
            )
        return make_weight(self._job, self._base, *parts)

    def _locate(self, matrix):
        return tuple(
            start if axis in self._job.batch_axes else slice(None)
            for axis, start in enumerate(matrix.starts)
        )


def _allocate_like(leaf):
    """Return an array to be filled, on the host or spread over devices as the leaf is."""
    if isinstance(leaf, np.ndarray):
        return np.empty(leaf.shape, leaf.dtype)
    return jnp.empty(
        leaf.shape, leaf.dtype, device=leaf.sharding if leaf.committed else None
    )


@functools.partial(jax.jit, static_argnames="batch_axes")
def _take_slice(stack, starts, batch_axes):
    sizes = [1 if axis in batch_axes else size for axis, size in enumerate(stack.shape)]
    return jnp.squeeze(jax.lax.dynamic_slice(stack, starts, sizes), batch_axes)


@functools.partial(jax.jit, static_argnames="batch_axes", donate_argnames="stack")
def _put_slice(stack, matrix, starts, batch_axes):
    return jax.lax.dynamic_update_slice(
        stack, jnp.expand_dims(matrix, batch_axes), starts
    )


def make_weight(job, base, u, v, core):
    rule, shape = job.entry.rule, job.entry.shape
    core = _complete_core(rule.trainable, u, core)
    axes = None if rule.layout.lstrip("b") == "io" else shape[-len(rule.layout) :]
    return AdaptedWeight(
        base if rule.residual else None,
        u,
        v,
        jnp.asarray(rule.scale, u.dtype),
        rule.trainable,
        rule.num_columns,
        jnp.dtype(job.leaf.dtype),
        core,
        rule.layout,
        axes,
    )


def _complete_core(part, u, core):
    """Return what is between the factors: one, where something is to be trained there."""
    if core is not None or part not in ("core", "s"):
        return core
    *batch, _, rank = u.shape
    one = jnp.ones(rank, u.dtype) if part == "s" else jnp.eye(rank, dtype=u.dtype)
    return jnp.broadcast_to(one, (*batch, *one.shape))
