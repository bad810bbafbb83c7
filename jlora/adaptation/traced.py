"""`adapt` inside a trace: a stack is one batch, and no values are looked at."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora._numerics import compute_dtype
from jlora._sharding import follow_axes
from jlora._types import Array, Scalar
from jlora.adaptation.adapted_weight import AdaptedWeight
from jlora.adaptation.programs import InitializedMatrix, initialize_matrix
from jlora.adaptation.tasks import MatrixRef, WeightTask, make_weight
from jlora.adaptation.weight_builder import restore_quantized
from jlora.layouts import complete_layout, invert_permutation
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import read_array


def adapt_traced(task: WeightTask) -> AdaptedWeight:
    """Return the adapted weight of a task whose arrays are traced.

    On explicit axes the results are sharded as `adapt` shards them.
    """
    w = jnp.asarray(read_array(task.leaf))
    scale = jnp.asarray(task.entry.rule.scale, compute_dtype(w.dtype))
    keys = task.key
    if task.batch:
        keys = jnp.stack([MatrixRef(task, i).key for i in range(task.num_matrices)])

    text, result = _name_axes(task)
    run = follow_axes(text, None, None, None, result=result)(_initialize)
    found = run(w, task.data, scale, keys, task)
    base = task.leaf if found.base is None else found.base
    if isinstance(found.base, QuantizedArray):
        base = restore_quantized(task, found.base)
    return make_weight(task, base, found.u, found.v, found.core)


def _initialize(
    w: Array, data: Array | None, scale: Scalar, keys: Array, task: WeightTask
) -> InitializedMatrix:
    """Return the results with batch axes in front, and a plain base in its layout."""
    if not task.batch:
        return initialize_matrix(w, scale, keys, data, task.spec)

    # Bring the batch axes to the front and flatten them.
    order = (*task.batch_axes, *task.matrix_axes)
    stack = w.transpose(order).reshape(-1, *task.matrix_shape)
    if data is not None:
        data = data.reshape(-1, *data.shape[len(task.batch) :])

    run = functools.partial(initialize_matrix, spec=task.spec)
    found = jax.vmap(run, in_axes=(0, None, 0, 0))(stack, scale, keys, data)
    found = jax.tree.map(lambda a: a.reshape(*task.batch, *a.shape[1:]), found)
    if isinstance(found.base, jax.Array):
        base = found.base.transpose(invert_permutation(order))
        found = found._replace(base=base)
    return found


def _name_axes(task: WeightTask) -> tuple[str, Any]:
    """Return the axes of a weight and of its results, for `follow_axes`."""
    layout = complete_layout(task.entry.rule.layout, len(task.entry.shape))
    letters = {"b": "b", "i": "m", "o": "n"}
    names: list[str] = []
    for i, letter in enumerate(layout):
        num_before = layout[:i].count(letter)
        names.append(f"{letters[letter]}{num_before}")

    stored = " ".join(names)
    batch = " ".join(name for name in names if name.startswith("b"))
    base = stored if task.spec.format is None else f"{batch} n0 m0"
    core = "_" if task.entry.rule.trainable == "s" else "_ _"
    texts: Any = base, f"{batch} m0 _", f"{batch} _ n0", f"{batch} {core}", batch
    return stored, InitializedMatrix(*texts)
