"""Options that several commands on adapters share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from jlora import _checks
from jlora.cli.output import say


def add_wish(parser: argparse.ArgumentParser) -> None:
    """Add --rank, --energy and --budget, of which one must be given."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=int, metavar="R", help="rank of every module")
    group.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="part of the squared norm of each matrix to keep, in (0, 1]",
    )
    group.add_argument(
        "--budget", type=int, metavar="P", help="numbers in the factors of all modules"
    )


def add_max_rank(parser: argparse.ArgumentParser) -> None:
    """Add --max-rank, of a command that decomposes whole matrices."""
    parser.add_argument(
        "--max-rank",
        type=int,
        default=256,
        help="largest rank with --energy and --budget (default: %(default)s)",
    )


def read_wish(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a job that these options stand for."""
    names = ("rank", "energy", "budget")
    wish = {name: getattr(arguments, name) for name in names}
    if hasattr(arguments, "max_rank"):
        wish["max_rank"] = _checks.check_integer(arguments.max_rank, "--max-rank")
    return wish


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add -o and --keep-ranks, of a command that writes an adapter."""
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="folder to write"
    )
    parser.add_argument(
        "--keep-ranks",
        action="store_true",
        help=(
            "write each module with its own rank, in a rank_pattern, which vLLM before "
            "2026 and llama.cpp read wrongly; without it factors are padded with zeros"
        ),
    )


def split_weights(texts: Sequence[str]) -> dict[str, float]:
    """Return {path: weight} of arguments PATH or PATH=WEIGHT, each path once."""
    pairs = [_split_weight(text) for text in texts]
    weights = dict(pairs)
    if len(weights) != len(pairs):
        raise ValueError(
            "`ADAPTER` must name each folder once, got one twice. Add its weights up."
        )
    return weights


def say_lines(text: object) -> None:
    """Print each line of a text, as long as somebody reads them."""
    all(say(line) for line in str(text).splitlines())


def _split_weight(text: str) -> tuple[str, float]:
    """Return (path, weight) of an argument PATH or PATH=WEIGHT."""
    path, separator, number = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(
            f"`ADAPTER` must be PATH or PATH=NUMBER, got {text!r}. Write for example "
            "adapter=0.5."
        )
    return path, weight
