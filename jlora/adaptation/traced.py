"""`adapt` inside a trace: a stack is one batch, and no values are looked at."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.programs import initialize_matrix
from jlora.adaptation.tasks import MatrixRef, WeightTask, make_weight
from jlora.adaptation.weight_builder import restore_quantized
from jlora.layouts import invert_permutation
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import read_array


def adapt_traced(task: WeightTask) -> AdaptedWeight:
    """Return the adapted weight of a task whose arrays are traced."""
    dtype = compute_dtype(task.leaf.dtype)
    scale = jnp.asarray(task.entry.rule.scale, dtype)
    w = jnp.asarray(read_array(task.leaf))
    if not task.batch:
        found = initialize_matrix(w, scale, task.key, task.data, task.spec)
        base = task.leaf if found.base is None else found.base
        if isinstance(base, QuantizedArray) and task.spec.format is not None:
            base = restore_quantized(task, base)
        return make_weight(task, base, found.u, found.v, found.core)

    # Bring the batch axes to the front and flatten them.
    order = (*task.batch_axes, *task.matrix_axes)
    stack = w.transpose(order).reshape(-1, *task.matrix_shape)
    keys = jnp.stack([MatrixRef(task, i).key for i in range(task.num_matrices)])
    data = task.data
    if data is not None:
        data = data.reshape(-1, *data.shape[len(task.batch) :])

    run = functools.partial(initialize_matrix, spec=task.spec)
    found = jax.vmap(run, in_axes=(0, None, 0, 0))(stack, scale, keys, data)
    found = jax.tree.map(lambda a: a.reshape(*task.batch, *a.shape[1:]), found)

    base = task.leaf
    if isinstance(found.base, QuantizedArray):
        base = restore_quantized(task, found.base)
    elif found.base is not None:
        base = found.base.transpose(invert_permutation(order))
    return make_weight(task, base, found.u, found.v, found.core)
