"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield an open binary file that becomes the file at `path` if the block succeeds.

    The content goes to a temporary file in the same folder, which is flushed to the
    disk and then renamed. If anything fails, the temporary file is removed and `path`
    keeps its old content.
    """
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _create(temporary, path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _create(temporary: pathlib.Path, path: pathlib.Path) -> BinaryIO:
    """Return the new temporary file, open for writing."""
    try:
        return open(temporary, "xb")
    except OSError as error:
        # Name the file that the user asked for, not the temporary one.
        raise type(error)(error.errno, error.strerror, str(path)) from None
