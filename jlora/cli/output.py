"""What commands print: one line a fact, whatever names hold and readers do."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def say(text: str) -> bool:
    """Print a line to stdout, and return whether somebody still reads it.

    A reader that has left, as after `| head -1`, is no error: later lines go nowhere,
    and the work goes on.
    """
    try:
        print(escape(text), flush=True)
    except BrokenPipeError:
        # Python flushes stdout again at its exit, which must find an open file.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return False
    return True


def complain(text: str) -> None:
    """Print a line to stderr, if there is one."""
    if sys.stderr is None:  # closed by the caller; print would take stdout
        return
    with contextlib.suppress(OSError):
        print(escape(text), file=sys.stderr, flush=True)


def escape(text: str) -> str:
    """Return the text with control characters as escapes: names come from files."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def prepare_streams() -> None:
    """Make characters that the terminal cannot show escapes instead of errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
