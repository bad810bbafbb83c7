"""Arrays of devices and of several processes on the host, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jlora._processes import (
    check_same,
    count_processes,
    is_first_process,
    raising_on_all,
    share_error,
)
from jlora._types import AnyArray


def write_together(
    path: Any,
    arrays: Mapping[str, AnyArray],
    write: Callable[[Iterator[np.ndarray]], None],
) -> None:
    """Call `write` with the values of arrays: on one process, if they are global.

    A global array lies on devices of several processes. If there is one, every process
    has to call this. Each array is gathered by all of them, and the first process
    writes. All return when it is done, or raise its error.

    Args:
        path: of the file or folder; the same on all processes.
        arrays: {name: array}, in the order in which they are written.
        write: takes the values and must use all of them.

    Raises:
        ValueError: names, shapes, dtypes or paths differ between processes, or an
            array has no part on one of them.
    """
    if not any(map(is_global, arrays.values())):
        write(map(to_host, arrays.values()))
        return

    for name, array in arrays.items():
        _check_gatherable(path, name, array)
    fields = [(name, each.shape, str(each.dtype)) for name, each in arrays.items()]
    advice = "Save the same arrays to one path on all of them."
    check_same((str(path), fields), "arrays", advice)
    if is_first_process():
        with raising_on_all():
            write(_gather(arrays.values()))
    else:
        for _ in _gather(arrays.values()):
            pass
        share_error(None)  # the end of `raising_on_all`


def is_global(array: Any) -> bool:
    """Return whether an array lies on devices of several processes."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def to_host(array: AnyArray) -> np.ndarray:
    """Return an array that this process holds as NumPy, without a copy in the cache.

    An array of JAX keeps the copy that `np.asarray` makes, so that a model would stay
    on the host. This one asks an object of its own with the same buffers.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    buffers = [shard.data for shard in array.addressable_shards]
    own = jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)
    return np.asarray(own)


def _gather(arrays: Iterable[AnyArray]) -> Iterator[np.ndarray]:
    """Yield the whole values of arrays; all processes take the same steps."""
    from jax.experimental import multihost_utils

    for array in arrays:
        # Raises if the first process has failed to write the array before this one.
        share_error(None)
        if is_global(array):
            yield multihost_utils.process_allgather(array, tiled=True)
        else:
            yield to_host(array)


def _check_gatherable(path: Any, name: str, array: AnyArray) -> None:
    """Refuse a global array that some process has no part of."""
    if not is_global(array):
        return
    assert isinstance(array, jax.Array)
    found = {device.process_index for device in array.sharding.device_set}
    if len(found) < count_processes():
        raise ValueError(
            f"{path}: {name} must lie on devices of all {count_processes()} processes, "
            f"got {len(found)} of them. Put it on a mesh of all devices first."
        )
