"""The anonymous memory of another process, sampled while it runs.

Pages of mapped files count as resident too, but the system may drop them at any time.
Anonymous and shared pages are the memory that a process cannot give back.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

_SECONDS_BETWEEN = 0.003
_FIELDS = ("RssAnon", "RssShmem")
_NUM_LINES_SHOWN = 20


def why_no_samples() -> str | None:
    """Return why the memory of a process cannot be sampled here, or None."""
    if sys.platform.startswith("linux"):
        return None
    return "the memory of a process is sampled on Linux only"


def measure_process(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: pathlib.Path | None = None,
) -> int:
    """Run a command to its end and return its peak of anonymous memory in bytes.

    A peak shorter than the 3 ms between two samples may be missed.

    Args:
        arguments: The program and its arguments.
        environment: Of the process. None: the present one.
        folder: That it starts in. None: the present one.

    Raises:
        RuntimeError: The command failed; the message ends with what it printed.
    """
    # Into a file: a process that fills a pipe waits until somebody reads it.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
        with process:
            try:
                peak = _sample_until_end(process)
            except BaseException:
                process.kill()
                raise
        output.seek(0)
        lines = output.read().splitlines()[-_NUM_LINES_SHOWN:]

    if process.returncode:
        raise RuntimeError(
            f"the process must end with code 0, got {process.returncode}:\n"
            + "\n".join(lines)
        )
    return peak


def _sample_until_end(process):
    """Return the largest of all samples, in bytes."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        peak = max(peak, _read_anonymous(status))
        time.sleep(_SECONDS_BETWEEN)
    return peak


def _read_anonymous(status):
    """Return the anonymous and shared bytes of a process, 0 if it has just ended."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    fields = [line.split() for line in lines if line.startswith(_FIELDS)]
    return 1024 * sum(int(field[1]) for field in fields)
