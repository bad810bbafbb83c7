"""`--targets`: the matrices of a file that a command works on."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from jlora import _checks
from jlora.adaptation.plan import Plan, make_plan
from jlora.adaptation.rule import Rule


def add_targets(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the option to a parser; the verb is for its help."""
    parser.add_argument(
        "--targets",
        default=".*",
        metavar="REGEX",
        help=f"{verb} matrices whose name matches (default: %(default)s)",
    )


def check_seed(arguments: argparse.Namespace) -> None:
    """Refuse a seed that is not an integer of 32 bits."""
    _checks.check_integer(arguments.seed, "--seed", minimum=0, maximum=2**32 - 1)


def check_targets(arguments: argparse.Namespace) -> None:
    """Refuse a pattern that is no regular expression."""
    if arguments.targets is None:  # of `jlora init`: its default
        return
    try:
        re.compile(arguments.targets)
    except re.error as error:
        raise ValueError(
            "`--targets` must be a regular expression, got "
            f"{arguments.targets!r} ({error}). Escape it."
        ) from None


def plan_targets(
    arguments: argparse.Namespace, arrays: Mapping[str, Any], rule: Rule
) -> Plan:
    """Return the plan of one rule for the arrays of a file; errors name the file."""
    try:
        return make_plan(arrays, rule)
    except ValueError as error:
        raise ValueError(f"{arguments.weights}: {error}") from None
