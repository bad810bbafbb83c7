"""`--targets`: which matrices of a file a command is about."""

import re

from jlora.adaptation.plan import make_plan


def add_targets(parser, verb):
    parser.add_argument(
        "--targets",
        default=".*",
        metavar="REGEX",
        help=f"{verb} matrices whose name matches (default: %(default)s)",
    )


def check_targets(arguments):
    try:
        re.compile(arguments.targets)
    except re.error as error:
        raise ValueError(
            f"`--targets` must be a regular expression, got {arguments.targets!r} ({error}). "
            "Escape it."
        ) from None


def plan_targets(arguments, arrays, rule):
    """Return the plan of the one rule for the arrays of the file, which is named in an error."""
    try:
        return make_plan(arrays, rule)
    except ValueError as error:
        raise ValueError(f"{arguments.weights}: {error}") from None
