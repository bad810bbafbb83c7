"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield an open binary file that becomes the file at `path` if the block succeeds.

    The content goes to a temporary file of its own in the same folder, which is flushed
    to the disk and then renamed. So of several writers the last one to finish wins, and
    each of their files is whole. A file that is replaced keeps its mode. If anything
    fails, the temporary file is removed and `path` keeps its old content.

    Raises:
        OSError: the file cannot be written; it names `path`.
        ValueError: `path` is no regular file, or its folder does not exist.
    """
    check_output(path)
    target = pathlib.Path(os.path.realpath(path))
    mode = stat.S_IMODE(os.stat(target).st_mode) if target.exists() else None

    # A short name: the name of the file itself may be as long as the system allows.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    with _naming(path), open(temporary, "xb") as file:
        try:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make an error of the system name the file that the user asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # NumPy's, of a disk that is full
            raise OSError(
                f"{path}: must be written whole, got: {error}. Free some space."
            ) from None
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def describe_kind(path: str | os.PathLike[str]) -> str:
    """Return the kind of a path that exists: "a file", "a folder", "a pipe", ..."""
    if os.path.islink(path) and not os.path.exists(path):
        return "a link to nothing"
    mode = os.stat(path).st_mode
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a file")


def check_output(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot become a file: check before the work, not after it.

    Raises:
        OSError: the path cannot be followed, such as a symbolic link to itself.
        ValueError: it is no regular file, or its folder cannot be written to.
    """
    if os.path.lexists(path):
        target = os.path.realpath(path)
        if os.path.islink(target):  # a loop of links
            os.stat(path)
        mode = os.stat(target).st_mode if os.path.exists(target) else stat.S_IFREG
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"{path}: must be a regular file or a new one, got "
                f"{describe_kind(target)}. "
                "Choose another path."
            )

    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(
            f"{path}: must be a file in a folder that can be written to, got none. "
            "Choose another path."
        )
