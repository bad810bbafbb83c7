"""Contenders made ready: inputs on the device, compiled, one call a run."""

import contextlib
import time

import jax
import numpy as np

from benchmarks.run.environment import count_threads, why_missing
from benchmarks.run.harness import Prepared


def prepare_jax(function, *arrays, donate=()):
    """Return `function` compiled for arrays that lie on the device.

    A donated argument is replaced by the result of the run before, which has its shape.
    """
    arguments = [jax.device_put(array) for array in arrays]
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    lower_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    compiled = lowered.compile()
    compile_ms = 1e3 * (time.perf_counter() - start)
    jax.block_until_ready(arguments)

    def run():
        result = jax.block_until_ready(compiled(*arguments))
        for index in donate:
            arguments[index] = result
        return result

    memory = compiled.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    total = (
        None
        if temporary is None
        else (
            temporary
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    )
    return Prepared(run, fetch_jax, lower_ms, compile_ms, total, temporary)


def fetch_jax(result):
    return jax.tree.map(np.asarray, result)


def prepare_torch(function, *arrays):
    """Return `function` on torch tensors, on the GPU where there is one; bfloat16 kept."""
    set_up_torch()
    tensors = [to_torch(array) for array in arrays]

    def fetch(result):
        return jax.tree.map(fetch_torch, tuple_of(result))

    return Prepared(lambda: wait_for_torch(function(*tensors)), fetch, pool="torch")


def set_up_torch():
    """Give torch the thread count of everybody, and a seed: svd_lowrank takes no generator."""
    import torch

    torch.set_num_threads(count_threads())
    torch.manual_seed(0)


def name_torch_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(array, device=None):
    """Return an array as a tensor on a device; None: on the GPU where there is one."""
    import torch

    if array.dtype == np.dtype("bfloat16"):
        tensor = torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor.to(name_torch_device() if device is None else device)


def wait_for_torch(result):
    """Return the result once the GPU, where there is one, has computed it."""
    if name_torch_device() == "cuda":
        import torch

        torch.cuda.synchronize()
    return result


def fetch_torch(tensor):
    return tensor.detach().float().cpu().numpy()


def prepare_host(function, *arrays):
    """Return `function` on NumPy arrays, its BLAS with as many threads as everybody has."""

    def run():
        with use_all_threads():
            return function(*arrays)

    return Prepared(run, lambda result: result, pool="blas")


def use_all_threads():
    """Return a context in which NumPy's and SciPy's BLAS have the thread count of the others.

    OPENBLAS_NUM_THREADS=1 is for the LAPACK calls inside XLA; it would also bind the peers.
    Contenders that run in it require threadpoolctl; a reference result is only slower without.
    """
    if why_missing(("threadpoolctl",)):
        return contextlib.nullcontext()
    import threadpoolctl

    return threadpoolctl.threadpool_limits(count_threads(), user_api="blas")


def tuple_of(result):
    """Return torch's named results as a plain tuple, a tensor as it is."""
    return tuple(result) if isinstance(result, tuple) else result
