"""Contenders made ready to run: inputs on the device, compiled, one call a run."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.run.contenders import Prepared
from benchmarks.run.environment import count_threads, why_missing


def prepare_jax(
    function: Callable, *arrays: np.ndarray, donate: Sequence[int] = ()
) -> Prepared:
    """Return `function` compiled for some arrays, which are put on the device.

    Args:
        donate: Indices of donated arguments. Each run replaces them by the result of
            the previous run, which has their shape.
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

    peak_bytes, temporary_bytes = measure_memory(compiled)
    return Prepared(run, fetch_jax, lower_ms, compile_ms, peak_bytes, temporary_bytes)


def measure_memory(compiled: Any) -> tuple[int | None, int | None]:
    """Return (peak, temporary) bytes of a compiled program, None if unknown.

    The peak counts arguments, results and temporaries, and donated memory once.
    """
    memory = compiled.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    if temporary is None:
        return None, None

    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    peak = temporary + arguments + results - memory.alias_size_in_bytes
    return peak, temporary


def fetch_jax(result: Any) -> Any:
    """Return a tree of JAX arrays as NumPy arrays."""
    return jax.tree.map(np.asarray, result)


def prepare_torch(function: Callable, *arrays: np.ndarray) -> Prepared:
    """Return `function` on torch tensors of the arrays' dtypes, on the GPU if any."""
    set_up_torch()
    tensors = [to_torch(array) for array in arrays]

    def fetch(result):
        return jax.tree.map(fetch_torch, _to_plain_tuple(result))

    return Prepared(lambda: wait_for_torch(function(*tensors)), fetch, pool="torch")


def _to_plain_tuple(result):
    """Return a named tuple of torch as a plain tuple, and a tensor unchanged."""
    return tuple(result) if isinstance(result, tuple) else result


def set_up_torch() -> None:
    """Give torch the thread count of all contenders, and a seed.

    The seed is global because `torch.svd_lowrank` takes no generator.
    """
    import torch

    torch.set_num_threads(count_threads())
    torch.manual_seed(0)


def name_torch_device() -> str:
    """Return "cuda" if torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(array: np.ndarray, device: str | None = None) -> Any:
    """Return an array as a torch tensor, bfloat16 included.

    Args:
        device: Name of a torch device. None: the GPU if there is one.
    """
    import torch

    if array.dtype == np.dtype("bfloat16"):
        tensor = torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor.to(name_torch_device() if device is None else device)


def wait_for_torch(result: Any) -> Any:
    """Return the result after torch's GPU, if any, has computed it."""
    if name_torch_device() == "cuda":
        import torch

        torch.cuda.synchronize()
    return result


def fetch_torch(tensor: Any) -> np.ndarray:
    """Return a torch tensor as a float32 NumPy array."""
    return tensor.detach().float().cpu().numpy()


def prepare_host(function: Callable, *arrays: np.ndarray) -> Prepared:
    """Return `function` on NumPy arrays, with the thread count of all contenders."""

    def run():
        with use_all_threads():
            return function(*arrays)

    return Prepared(run, lambda result: result, pool="blas")


def use_all_threads() -> contextlib.AbstractContextManager:
    """Return a context in which the BLAS of NumPy and SciPy uses all threads.

    OPENBLAS_NUM_THREADS=1 is meant for the LAPACK calls inside XLA, but it would also
    limit the peers. Contenders that run in this context require threadpoolctl. Without
    it, a reference result only takes longer.
    """
    if why_missing(("threadpoolctl",)):
        return contextlib.nullcontext()
    import threadpoolctl

    return threadpoolctl.threadpool_limits(count_threads(), user_api="blas")
