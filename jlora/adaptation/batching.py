"""`adapt`: all weights of a plan decomposed, those of one shape by one compiled program.

The matrices of one shape, dtype and way of starting make a group; a group is cut into chunks of one
size, and a chunk is stacked, decomposed, and taken apart again. The size of a chunk follows from
the shape and never from how many matrices there are, so that another layer changes neither the
program nor any other layer's bits.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import compute_dtype
from jlora._progress import Progress
from jlora.adaptation.paths import map_leaves
from jlora.adaptation.plan import Plan, list_data
from jlora.adaptation.programs import start_chunk, start_donated, start_matrix
from jlora.adaptation.tasks import Matrix, Result, find_weights, make_task, make_weight
from jlora.layouts import invert

# Numbers in a chunk that keep a device busy. A CPU is busy with one matrix, and stacking only
# copies: 56 matrices of a model took 1.1 to 1.3 times as long in stacks of 8.
_CHUNK_NUMBERS = {"cpu": 1, "gpu": 2**25, "tpu": 2**25}
_CPU_BYTES = 2**30


def adapt(params, plan, *, key, data=None, max_bytes=None, donate=False, progress=None):
    """Return the tree with an AdaptedWeight in place of each weight of the plan.

    Weights of one shape are decomposed by one program, in chunks under a limit of memory. Arrays
    of NumPy are moved to the device chunk by chunk, and their bases back; other leaves, and the
    bases that an initialisation leaves alone, are the same objects as before.

    Args:
        params: pytree of arrays that the plan was made for.
        plan: `Plan`, static.
        key: one typed PRNG key, consumed; folded with each path, and with the place in a stack,
            so that no matrix's numbers depend on which others there are.
        data: what some initialisations look at beside the weight, see `Rule`: {path: array}, or a
            tree like params, such as gradients or fine-tuned weights. None: none.
        max_bytes: static, the most memory of a chunk and its work space. None: a quarter of what
            the device has free, 1 GiB on a CPU. Another size of chunk may change the last bits.
        donate: static; a weight's memory may become its base's, and `params` is gone: used up
            weight by weight, whatever comes in between. Not for arrays of NumPy, which stay.
        progress: None: on a terminal a bar of the matrices done, with bytes a second. True: plain
            lines elsewhere too. False: neither.

    Returns:
        The tree. With the residual kept, base + scale * u @ v equals the weight to the rounding
        of the base's dtype; quantised bases and "difference" excepted.

    Raises:
        TypeError: `plan` is no Plan, `key` no typed key, or a weight is abstract.
        ValueError: the tree does not have a planned weight in its planned shape, a weight was
            donated before, holds NaN or Inf, or does not fit into `max_bytes`; no `data` for an
            initialisation that needs some (all with the path; values are not checked under jit).

    Cost: for each weight one decomposition, see `randomized_svd`. Compiled programs: one for each
        shape, layout, dtype, rank and initialisation. Memory: the bases, and one chunk.

    Accuracy: ‖base + scale u v - w‖ / ‖w‖ is 2e-8 for float32 bases that give way to factors and
        2e-3 for bfloat16 ones; 0 for "lora", "eva" and "lora_xs", 2e-7 for "orthogonal"; for
        "loftq" and "qpissa" what the quantiser costs, 0.09 for NF4 and rank 16 of a Gaussian
        matrix. `diagnose` tells it for each weight. Right for any base: the residual is
        subtracted in at least float32.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.zeros(6)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> bool(abs(jlora.merge(adapted)["w"] - params["w"]).max() < 1e-5)
        True
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`plan` must be a jlora.adaptation.Plan, got {type(plan).__name__}. Make one with make_plan."
        )
    _checks.check_key(key)
    if max_bytes is not None:
        max_bytes = _checks.check_integer(max_bytes, "max_bytes")
    weights, data = find_weights(params, plan, donate=donate), list_data(data)
    jobs = [
        make_task(entry, weights[entry.path], data, key, donate)
        for entry in plan.entries
    ]
    groups, adapted = {}, {}
    for job in jobs:
        if job.is_traced:
            adapted[job.entry.path] = _adapt_traced(job)
        else:
            groups.setdefault(_identify_program(job), []).append(job)
    sizes = {
        program: choose_chunk_size(members[0], max_bytes)
        for program, members in groups.items()
    }
    bar = Progress(
        "adapt",
        sum(job.num_matrices for job in jobs),
        enabled=progress,
        is_quiet=progress is None,
        unit="matrices",
    )
    try:
        for program, members in groups.items():
            adapted |= _adapt_group(members, sizes[program], bar)
    finally:
        bar.close()
    return map_leaves(lambda path, leaf: adapted.get(path, leaf), params)


def _identify_program(job):
    data = (
        None if job.data is None else (job.data.shape[-2:], jnp.dtype(job.data.dtype))
    )
    return job.how, job.matrix_shape, jnp.dtype(job.leaf.dtype), data, job.donate


def _adapt_group(jobs, size, bar):
    """Return {path: AdaptedWeight} of weights that share a program, in chunks of `size`."""
    results = {job.entry.path: Result(job) for job in jobs}
    matrices = [Matrix(job, index) for job in jobs for index in range(job.num_matrices)]
    # One chunk is computed while the next is sent, but on a CPU, where both would need memory.
    waiting = []
    for chunk in _cut(matrices, size):
        waiting.append((chunk, _dispatch(chunk, results, size)))
        if len(waiting) > (0 if jax.default_backend() == "cpu" else 1):
            _collect(*waiting.pop(0), results, bar)
    while waiting:
        _collect(*waiting.pop(0), results, bar)
    return {path: result.finish() for path, result in results.items()}


def choose_chunk_size(job, max_bytes=None, platform=None):
    """Return how many matrices of this kind are decomposed at once: of their shape alone."""
    numbers = math.prod(job.matrix_shape)
    # A matrix in a chunk, and at its side what its residual is computed in.
    needed = numbers * (
        job.leaf.dtype.itemsize + 2 * compute_dtype(job.leaf.dtype).itemsize
    )
    if max_bytes is not None and needed > max_bytes:
        raise ValueError(
            f"{job.entry.path}: `max_bytes` must hold one matrix and its work space, {needed} "
            f"bytes, got {max_bytes}. Raise it."
        )
    platform = jax.default_backend() if platform is None else platform
    fills = _CHUNK_NUMBERS.get(platform, 2**25) // numbers
    limit = _find_free_bytes() if max_bytes is None else max_bytes
    return max(1, min(fills, limit // needed))


def _find_free_bytes():
    """Return a quarter of what the default device has free, 1 GiB where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _CPU_BYTES
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 4


def _cut(items, size):
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _dispatch(chunk, results, size):
    """Start a chunk on the device: (base, u, v, core, is_good) of each matrix."""
    ws = [results[matrix.job.entry.path].take(matrix) for matrix in chunk]
    keys = [matrix.key for matrix in chunk]
    datas = [_take_data(matrix) for matrix in chunk]
    scales = [
        np.asarray(matrix.job.entry.rule.scale, compute_dtype(ws[0].dtype))
        for matrix in chunk
    ]
    # The last chunk is filled up with zeros, so that it runs the same program.
    for _ in range(size - len(chunk)):
        ws.append(jnp.zeros_like(ws[0]))
        keys.append(keys[0])
        datas.append(datas[0])
        scales.append(scales[0])
    first = chunk[0].job
    start = start_donated if first.donate else start_chunk
    return start(tuple(ws), tuple(scales), tuple(keys), tuple(datas), how=first.how)


def _take_data(matrix):
    data = matrix.job.data
    if data is None:
        return None
    return jnp.asarray(data.reshape(-1, *data.shape[-2:])[matrix.index])


def _collect(chunk, started, results, bar):
    """Put what a chunk gave into the results, once it is there."""
    for matrix, (base, u, v, core, is_good) in zip(chunk, started, strict=False):
        if not is_good:
            _refuse_matrix(matrix)
        results[matrix.job.entry.path].put(matrix, base, u, v, core)
    itemsize = chunk[0].job.leaf.dtype.itemsize
    bar.advance(
        len(chunk),
        num_bytes=len(chunk) * math.prod(chunk[0].job.matrix_shape) * itemsize,
    )


def _refuse_matrix(matrix):
    """Raise, with how much is wrong with the weight where it is still there to be looked at."""
    path, leaf, data = matrix.job.entry.path, matrix.job.leaf, matrix.job.data
    if not (isinstance(leaf, jax.Array) and leaf.is_deleted()):
        _checks.check_finite(leaf, path)
    if data is not None:
        _checks.check_finite(data, f"data[{path!r}]")
    raise ValueError(
        f"`{path}` must have finite factors of rank {matrix.job.how.rank}, got NaN or Inf. "
        "Look for NaN or Inf in it, and for values at the limits of its dtype."
    )


def _adapt_traced(job):
    """Return the AdaptedWeight of a weight inside a trace: its stack as one batch."""
    scale = jnp.asarray(job.entry.rule.scale, compute_dtype(job.leaf.dtype))
    leaf = jnp.asarray(job.leaf)
    if not job.batch:
        *parts, _ = start_matrix(leaf, scale, job.key, job.data, job.how)
        return make_weight(job, leaf if parts[0] is None else parts[0], *parts[1:])
    kept = tuple(axis for axis in range(leaf.ndim) if axis not in job.batch_axes)
    order = (*job.batch_axes, *kept)
    stack = leaf.transpose(order).reshape(-1, *job.matrix_shape)
    keys = jnp.stack([Matrix(job, i).key for i in range(job.num_matrices)])
    data = None if job.data is None else job.data.reshape(-1, *job.data.shape[-2:])
    start = jax.vmap(
        functools.partial(start_matrix, how=job.how), in_axes=(0, None, 0, 0)
    )
    *parts, _ = start(stack, scale, keys, data)
    base, *others = jax.tree.map(lambda a: a.reshape(*job.batch, *a.shape[1:]), parts)
    if base is not None:
        base = base.transpose(invert(order))
    return make_weight(job, leaf if base is None else base, *others)
