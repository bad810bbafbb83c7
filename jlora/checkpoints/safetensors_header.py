"""Headers of safetensors files: where each tensor lies, without reading its data."""

from __future__ import annotations

import math
import os
import struct
from typing import Any, NamedTuple

from jlora.checkpoints.json_files import parse_json

# The limit of the library's own reader.
_MAX_HEADER_BYTES = 100_000_000


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: str  # the format's own code, such as "BF16"
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    num_bytes: int


class Header(NamedTuple):
    """What a safetensors file says of its tensors."""

    entries: dict[str, TensorEntry]  # in the order of the data
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Return the header of a safetensors file after the library has checked it.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is damaged, with the reason.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        num_bytes = os.fstat(file.fileno()).st_size
        length = _check_length(path, start, num_bytes)
        text = file.read(length)

    _check_by_library(path, num_bytes, text)
    fields = parse_json(text, path)
    metadata = fields.pop("__metadata__", None) or {}
    entries = [(name, _make_entry(field, 8 + length)) for name, field in fields.items()]
    entries.sort(key=lambda pair: (pair[1].start, pair[1].num_bytes))
    return Header(dict(entries), metadata)


def _make_entry(field: dict[str, Any], offset: int) -> TensorEntry:
    begin, end = field["data_offsets"]
    return TensorEntry(
        field["dtype"], tuple(field["shape"]), offset + begin, end - begin
    )


def _check_length(path: Any, start: bytes, num_bytes: int) -> int:
    """Return the number of bytes of the header, or refuse what is no such file."""
    if start.startswith(b"version "):
        raise ValueError(
            f"{path}: must be a safetensors file, got the pointer of git-lfs to one. "
            "Fetch the file itself with `git lfs pull`."
        )
    if len(start) < 8:
        raise ValueError(
            f"{path}: must be a whole safetensors file, got {num_bytes} bytes. "
            "Copy or download it again."
        )
    (length,) = struct.unpack("<Q", start)
    if length > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: must be a whole safetensors file, whose header has at most "
            f"{_MAX_HEADER_BYTES} bytes, got {length}. Copy or download it again."
        )
    if 8 + length > num_bytes:
        raise ValueError(
            f"{path}: must be a whole safetensors file, got one that ends within its "
            f"header. {8 + length - num_bytes} bytes are missing; download it again."
        )
    return length


def _check_by_library(path: Any, num_bytes: int, text: bytes) -> None:
    """Refuse what the library's reader refuses, and say what a wrong size means."""
    import safetensors  # on use, which keeps the import of jlora fast

    try:
        with safetensors.safe_open(path, "numpy"):
            return
    except safetensors.SafetensorError as error:
        reason = f"got one that cannot be read ({error})"

    difference = _find_missing(num_bytes, text)
    if difference > 0:
        reason = f"got one that ends too early: {difference} bytes are missing"
    elif difference < 0:
        reason = f"got one with {-difference} extra bytes after its tensors"
    raise ValueError(
        f"{path}: must be a whole safetensors file, {reason}. "
        "Copy or download it again."
    )


def _find_missing(num_bytes: int, text: bytes) -> int:
    """Return how many bytes of data a file lacks; 0 if its header does not say."""
    try:
        fields = parse_json(text, "")
        fields.pop("__metadata__", None)
        ends = [field["data_offsets"][1] for field in fields.values()]
        sizes = [math.prod(field["shape"]) for field in fields.values()]
        needed = 8 + len(text) + max(ends, default=0)
        return needed - num_bytes if all(size >= 0 for size in sizes) else 0
    except (ValueError, TypeError, KeyError, IndexError):
        return 0
