"""Options that all jobs on checkpoints and adapters share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from jlora.cli.output import say

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_job_options(parser: argparse.ArgumentParser, *, has_layouts: bool) -> None:
    """Add --max-memory, --dry-run and maybe --layout."""
    add = parser.add_argument
    add(
        "--max-memory",
        metavar="SIZE",
        help="memory of the process, such as 4GiB; JAX itself takes about 200 MiB",
    )
    add("--dry-run", action="store_true", help="check, say what would be done, stop")
    if has_layouts:
        add(
            "--layout",
            metavar="[REGEX=]io|oi",
            action="append",
            default=[],
            help=(
                "how matrices that match are stored: [inputs, outputs] or [outputs, "
                "inputs]; may be given several times (default: what jlora knows of the "
                "model, else oi, as PyTorch)"
            ),
        )


def add_process(parser: argparse.ArgumentParser) -> None:
    """Add --process."""
    parser.add_argument(
        "--process",
        metavar="I/N",
        help=(
            "do part I of N, numbered from 0; the other parts are run with the same "
            "arguments on the same file system, and the last one completes DIR"
        ),
    )


def read_job_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a job that these options stand for."""
    options: dict[str, Any] = {"dry_run": arguments.dry_run, "max_memory": None}
    if arguments.max_memory is not None:
        options["max_memory"] = parse_size(arguments.max_memory, "--max-memory")
    if hasattr(arguments, "layout"):
        options["layouts"] = _split_layouts(arguments.layout)
    if getattr(arguments, "process", None) is not None:
        options["process"] = _parse_process(arguments.process)
    return options


def is_left_to_others(arguments: argparse.Namespace) -> bool:
    """Print and return whether other processes still have parts of the job."""
    is_part = arguments.process is not None and not arguments.dry_run
    is_left = is_part and not os.path.exists(arguments.output)
    if is_left:
        say(
            f"part {arguments.process} of {arguments.output} is done; the last of the "
            "other parts completes it"
        )
    return is_left


def say_end(arguments: argparse.Namespace, text: str) -> None:
    """Print the last line of a job: what it wrote, or would write."""
    verb = "would write" if arguments.dry_run else "wrote"
    say(f"{verb} {arguments.output}: {text}")


def parse_size(text: str, name: str) -> int:
    """Return the bytes of a text such as "1GiB", "500 MB" or "1000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(iB|B)?\s*", text, re.I)
    if match is None:
        raise ValueError(
            f"`{name}` must be a number of bytes, got {text!r}. Write for example 4GiB."
        )
    number, unit, end = match.groups()
    units = _DECIMAL if (end or "").upper() == "B" else _UNITS
    return int(float(number) * units[unit.upper()])


def _parse_process(text: str) -> tuple[int, int]:
    """Return (index, count) of a text such as "0/4"."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            "`--process` must be I/N with 0 <= I < N, such as 0/4 to 3/4, got "
            f"{text!r}. Number the processes from 0."
        )
    return int(match[1]), int(match[2])


def _split_layouts(texts: Sequence[str]) -> dict[str, str] | None:
    """Return {regular expression: layout} of arguments REGEX=LAYOUT or LAYOUT."""
    pairs = [text.rpartition("=") for text in texts]
    return {pattern or ".*": layout for pattern, _, layout in pairs} or None
