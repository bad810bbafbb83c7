"""The resident memory that a function needs."""

import ctypes
import pathlib

import jax


def measure_memory(run):
    """Return the peak of resident memory during run() above the present, in GiB.

    The result of the run counts. None if the system is not Linux, or if JAX computes on
    a device whose memory is not the process's.
    """
    if jax.default_backend() != "cpu":
        return None

    try:
        # Return freed memory to the system first: a run could use it unnoticed.
        ctypes.CDLL(None).malloc_trim(0)
        # Set the recorded peak to the present use.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _read_memory("VmRSS")
    except (OSError, AttributeError):
        return None

    result = jax.block_until_ready(run())
    peak = _read_memory("VmHWM")
    del result
    return (peak - before) / 2**30


def _read_memory(field):
    """Return a field of the process's status, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
