"""Collects the arrays of one weight, matrix by matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Array
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.lazy_arrays import LazyArray, LazyResidual
from jlora.adaptation.programs import InitializedMatrix
from jlora.adaptation.tasks import MatrixRef, WeightTask, make_weight
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import is_registered, read_array


class WeightBuilder:
    """Collects the factors of one (possibly stacked) weight and builds the result."""

    def __init__(self, task: WeightTask) -> None:
        self._task = task
        # Of each matrix: u, v, core, quantised base.
        self._parts: list[Any] = [None] * task.num_matrices
        self._base: Any = task.leaf
        self._kept: np.ndarray | None = None  # a lazy stack while it is decomposed
        # A residual need not be kept: it is read as the weight without its delta.
        self._is_lazy_base = (
            isinstance(task.leaf, LazyArray)
            and task.spec.initializer.has_residual_base
            and task.spec.format is None
        )
        is_kept = task.donate or self._is_lazy_base or task.spec.format is not None
        if task.has_new_base and task.batch and not is_kept:
            # The bases of a stack are written one by one, and the leaf is the caller's.
            self._base = _allocate_like(task.leaf)

    def take_matrix(self, ref: MatrixRef) -> Array | np.ndarray:
        """Return one matrix of the weight, on the device or on the host."""
        source = self._base if self._task.donate else self._task.leaf
        if isinstance(source, LazyArray):
            source = self._read_lazy(source, ref)
        elif is_registered(source):
            source = read_array(source)
        if not self._task.batch:
            return source
        if isinstance(source, np.ndarray):
            return source[self._locate(ref)]
        return _take_slice(source, ref.offsets, self._task.batch_axes)

    def _read_lazy(self, leaf: LazyArray, ref: MatrixRef) -> np.ndarray:
        """Return a whole leaf, which is kept until its last matrix was taken."""
        array = leaf.read() if self._kept is None else self._kept
        self._kept = array if ref.index + 1 < self._task.num_matrices else None
        return array

    def put_matrix(self, ref: MatrixRef, found: InitializedMatrix) -> None:
        """Keep the arrays of one matrix, and write its base into the stack."""
        quantized = found.base if isinstance(found.base, QuantizedArray) else None
        self._parts[ref.index] = (found.u, found.v, found.core, quantized)
        if found.base is None or quantized is not None or self._is_lazy_base:
            return

        leaf = self._task.leaf
        is_on_host = isinstance(leaf, (np.ndarray, LazyArray))
        if not self._task.batch:
            self._base = np.array(found.base, leaf.dtype) if is_on_host else found.base
        elif is_on_host:
            self._base[self._locate(ref)] = found.base
        else:
            axes = self._task.batch_axes
            self._base = _put_slice(self._base, found.base, ref.offsets, axes)

    def build(self) -> AdaptedWeight:
        """Return the adapted weight, once all its matrices are there."""
        parts = self._parts[0]
        if self._task.batch:
            batch = self._task.batch
            parts = jax.tree.map(lambda *arrays: jnp.stack(arrays), *self._parts)
            parts = jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), parts)
        *factors, quantized = parts
        if quantized is not None:
            self._base = restore_quantized(self._task, quantized)
            if self._task.donate:
                self._task.leaf.delete()
        weight = make_weight(self._task, self._base, *factors)
        if not (self._is_lazy_base and self._task.has_new_base):
            return weight
        rule = self._task.entry.rule
        scale = 1.0 if rule.scale is None else rule.scale
        base = LazyResidual(self._task.leaf, weight.factors, scale, rule.layout)
        return dataclasses.replace(weight, base=base)

    def _locate(self, ref: MatrixRef) -> tuple[int | slice, ...]:
        return tuple(
            offset if axis in self._task.batch_axes else slice(None)
            for axis, offset in enumerate(ref.offsets)
        )


def restore_quantized(task: WeightTask, base: QuantizedArray) -> QuantizedArray:
    """Return the base of matrices in the layout of the weight."""
    layout, shape = task.entry.rule.layout, task.entry.shape
    return dataclasses.replace(base, layout=layout, axes=shape[-len(layout) :])


def _allocate_like(leaf: Any) -> Any:
    """Return an array to be filled, on the host or sharded as the leaf."""
    if isinstance(leaf, (np.ndarray, LazyArray)):
        return np.empty(leaf.shape, leaf.dtype)
    device = leaf.sharding if leaf.committed else None
    return jnp.empty(leaf.shape, leaf.dtype, device=device)


@functools.partial(jax.jit, static_argnames="batch_axes")
def _take_slice(
    stack: Array, offsets: tuple[int, ...], batch_axes: tuple[int, ...]
) -> Array:
    sizes = [1 if axis in batch_axes else size for axis, size in enumerate(stack.shape)]
    return jnp.squeeze(jax.lax.dynamic_slice(stack, offsets, sizes), batch_axes)


@functools.partial(jax.jit, static_argnames="batch_axes", donate_argnames="stack")
def _put_slice(
    stack: Array, matrix: Array, offsets: tuple[int, ...], batch_axes: tuple[int, ...]
) -> Array:
    update = jnp.expand_dims(matrix, batch_axes)
    return jax.lax.dynamic_update_slice(stack, update, offsets)
