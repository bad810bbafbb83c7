"""Output paths of a command, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jlora.checkpoints.files import check_output


def check_outputs(
    outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]
) -> None:
    """Refuse an output that is no file to be, an input, or another output.

    Args:
        outputs: {option: path}; None: not asked for.
        inputs: {option: path} of the files that the command reads.
    """
    seen = {_identify(path): name for name, path in inputs.items() if path}
    for name, path in outputs.items():
        if not path:
            continue
        check_output(path)
        other = seen.setdefault(_identify(path), name)
        if other != name:
            raise ValueError(
                f"`{name}` must be another file than {other}, got {path} for both. "
                "Choose another path."
            )


def _identify(path: str) -> tuple:
    """Return a value that is the same for two paths to one file."""
    path = os.path.realpath(path)
    try:
        status = os.stat(path)
    except OSError:
        return (path,)
    return status.st_dev, status.st_ino
