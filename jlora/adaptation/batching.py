"""`adapt`: adapts all weights of a plan, one compiled program for each shape."""

from __future__ import annotations

from jax.sharding import Mesh

from jlora import _checks
from jlora._progress import Progress
from jlora._types import PRNGKey, Tree
from jlora.adaptation.chunks import adapt_group, choose_chunk_size
from jlora.adaptation.data import list_data
from jlora.adaptation.lazy_arrays import open_tree
from jlora.adaptation.mesh_groups import (
    adapt_mesh_group,
    check_agreement,
    group_tasks,
)
from jlora.adaptation.paths import map_leaves
from jlora.adaptation.plan import Plan
from jlora.adaptation.tasks import list_tasks
from jlora.adaptation.traced import adapt_traced


def adapt(
    params: Tree,
    plan: Plan,
    *,
    key: PRNGKey,
    data: Tree | None = None,
    max_bytes: int | None = None,
    donate: bool = False,
    progress: bool | None = None,
    mesh: Mesh | None = None,
) -> Tree:
    """Return the tree with an `AdaptedWeight` in place of each weight of the plan.

    Weights of one shape share a compiled program, which runs in chunks under a memory
    limit. NumPy arrays are moved to the device chunk by chunk, and their bases back.
    Other leaves, and bases that an initializer leaves unchanged, stay the same objects.

    A weight that is sharded over a mesh stays so, and its factors follow it axis by
    axis: u is sharded as the inputs, v as the outputs, both as the batch axes. Weights
    of one shape are decomposed in the way that costs least there, see `make_plan`.

    Args:
        params: pytree of arrays that the plan was made for, or an open checkpoint
            (`jlora.checkpoints.open_checkpoint`). Its weights are read one by one and
            not kept: the tree is {name: leaf}, whose bases and other leaves are
            `jlora.adaptation.LazyArray`s that read their file when they are used.
        plan: `Plan`, static.
        key: one typed PRNG key, consumed; folded with each path and with the index in a
            stack, so that no matrix's values depend on which others there are.
        data: the input that some initializers need beside the weight, see
            `jlora.initializers`: {path: array}, or a tree like params, such as
            gradients or fine-tuned weights. None: none.
        max_bytes: static, the most memory of a chunk and its work space. None: a
            quarter of the device's free memory, 1 GiB on a CPU. Another chunk size may
            change the last bits.
        donate: static. Reuse each weight's buffer for its base. Do not use `params`
            afterwards, even if `adapt` raises. NumPy arrays are not donated.
        progress: None: a bar of the matrices done on a terminal, with bytes per second.
            True: plain lines elsewhere too. False: neither.
        mesh: over whose devices the matrices of weights are dealt out that lie on one
            device or on the host; their results return there. If it does not divide
            the number of matrices, some devices decompose a matrix of zeros. Weights
            on a mesh need none. None: these weights are decomposed on one device.

    Returns:
        The tree. base + scale * u @ v equals the weight up to the rounding of the base,
        unless the initializer quantises the base, drops it, or moves the weight
        ("difference").

    Raises:
        TypeError: `plan` is no Plan, `key` no typed key, `mesh` no mesh, or a weight is
            abstract.
        ValueError: a planned weight is missing or has another shape, was donated
            before, holds NaN or Inf, or does not fit into `max_bytes`; no `data` for an
            initializer that needs it; weights on meshes of different devices; a plan
            or a key that differs between the processes of a mesh; or a
            `parallel` of its rule that its sharding does not allow (all with the path;
            values are not checked under jit).

    Cost: one decomposition for each weight, see `randomized_svd`. Compiled programs:
        one for each shape, layout, dtype, rank and initializer. Memory: the bases, and
        one chunk.

    Accuracy: relative reconstruction error ‖base + scale u v − w‖ / ‖w‖: about 2e-8 if
        the base is a float32 residual, 2e-3 if it is bfloat16; 0 for "lora", "eva" and
        "lora_xs", 2e-7 for "orthogonal". For "loftq" and "qpissa" it is the error of
        the quantised base, 0.09 for NF4 and rank 16 of a Gaussian matrix. `diagnose`
        measures it for each weight. The residual is subtracted in at least float32.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> w = jax.random.normal(jax.random.key(0), (8, 6))
        >>> params = {"w": w, "b": jnp.zeros(6)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> adapted["w"].factors.u.shape, adapted["b"].shape
        ((8, 2), (6,))
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`plan` must be a Plan, got {type(plan).__name__}. "
            "Make one with jlora.make_plan."
        )
    _checks.check_key(key)
    if max_bytes is not None:
        max_bytes = _checks.check_integer(max_bytes, "max_bytes")

    params = open_tree(params)
    tasks = list_tasks(params, plan, list_data(data), key, donate=donate)
    adapted = {t.entry.path: adapt_traced(t) for t in tasks if t.is_traced}
    groups, placed_groups = group_tasks([t for t in tasks if not t.is_traced], mesh)
    check_agreement(placed_groups, plan, key)

    # Refuse a matrix that does not fit before the first one is decomposed.
    sizes = [choose_chunk_size(members[0], max_bytes) for members in groups]
    placed_sizes = [choose_chunk_size(g.tasks[0], max_bytes) for g in placed_groups]
    total = sum(task.num_matrices for task in tasks)
    quiet = progress is None
    bar = Progress("adapt", total, enabled=progress, is_quiet=quiet, unit="matrices")
    try:
        for members, size in zip(groups, sizes, strict=True):
            adapted |= adapt_group(members, size, bar)
        for group, size in zip(placed_groups, placed_sizes, strict=True):
            adapted |= adapt_mesh_group(group, size, bar)
    finally:
        bar.close()
    return map_leaves(lambda path, leaf: adapted.get(path, leaf), params)
