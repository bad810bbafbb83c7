"""`max_memory`: how much memory a job may take, and whether its work fits."""

from __future__ import annotations

from jlora import _checks

# Memory of Python, JAX and its compiler beside arrays: 100 MiB after the import, and as
# much while XLA compiles one program.
_RESERVE = 200 * 2**20


def check_max_memory(max_memory: int | None) -> int | None:
    """Return the checked limit in bytes; None: none."""
    if max_memory is None:
        return None
    max_memory = _checks.check_integer(max_memory, "max_memory")
    if max_memory < 2 * _RESERVE:
        raise ValueError(
            f"`max_memory` must be at least {2 * _RESERVE} bytes, of which JAX takes "
            f"half, got {max_memory}. Raise it."
        )
    return max_memory


def find_work_bytes(max_memory: int | None) -> int | None:
    """Return the bytes that arrays may take; None: no limit."""
    return None if max_memory is None else max_memory - _RESERVE


def check_fits(max_memory: int | None, needed: int, name: str) -> None:
    """Refuse work on `name` that takes more bytes than there are."""
    if max_memory is not None and needed + _RESERVE > max_memory:
        raise ValueError(
            f"{name}: `max_memory` must hold the work on one matrix, "
            f"{needed + _RESERVE} bytes, got {max_memory}. Raise it, or leave the "
            "matrix out of `targets`."
        )
