"""JSON files of checkpoints and adapters, read without trust."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

MAX_BYTES = 10 * 2**20  # huggingface_hub's limit for an index


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict:
    """Return the object of a JSON file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no regular file, too large, no JSON object, holds a name
            twice, or is nested too deeply.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        path.stat()  # a missing file is an OSError
        raise ValueError(f"{path}: must be a regular file, got none. Choose a file.")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(
            f"{path}: must have at most {max_bytes} bytes, got {size}. Choose a file "
            "of JSON."
        )
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, path: str | os.PathLike[str]) -> dict:
    """Return the object of a JSON text; `path` is named in errors."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: must be a JSON file, got one that cannot be read ({reason}). "
            "Write it again."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: must hold a JSON object, got {type(found).__name__}. "
            "Write it again."
        )
    return found


def write_json(file: Any, content: dict) -> None:
    """Write an object to an open binary file, in the form of Hugging Face's files."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write((text + "\n").encode("utf-8"))


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it holds {twice!r} twice")
    return found
