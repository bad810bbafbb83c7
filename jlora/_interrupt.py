"""Ctrl-C while the command is still importing, which takes a second."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

EXIT_CODE = 130  # 128 + SIGINT, as shells have it


def _exit_on_interrupt() -> None:
    """End the process quietly at an interrupt, if it runs the command `jlora`.

    Called below, when `jlora` starts to be imported. The command's own handling starts
    with `jlora.cli.main.main`, after the imports.
    """
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    if name in ("jlora", "jlora.exe", "-m"):
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(EXIT_CODE)


def raise_on_interrupt() -> None:
    """Let an interrupt raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_exit_on_interrupt()
