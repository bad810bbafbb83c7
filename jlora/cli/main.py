"""The `jlora` command: runs a subcommand, and prints a user's error as one line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from jlora._interrupt import EXIT_CODE, raise_on_interrupt
from jlora.cli import adapt, combine, demo, extract, init, merge, ranks, resize, show
from jlora.cli.output import complain, prepare_streams

_COMMANDS = (demo, adapt, ranks, show, init, extract, merge, resize, combine)
# Errors that a user can cause. Any other one is a bug of jlora, and says so.
_USER_ERRORS = (OSError, ValueError, TypeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 refused, 130 interrupted."""
    # LAPACK's threads compete with XLA's and slow small decompositions 10 to 100 times.
    # Set before the first decomposition loads LAPACK; a value of the user's own stays.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    prepare_streams()
    raise_on_interrupt()

    arguments = _build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        message = "interrupted, nothing more is written"
        complain(f"jlora {arguments.command}: {message}")
        return EXIT_CODE
    except Exception as error:
        if arguments.debug:
            raise
        complain(f"jlora {arguments.command}: {_format_error(error)}")
        return 2
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jlora", description="Low-rank adaptation of large models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for command in _COMMANDS:
        subparser = command.add_parser(commands)
        subparser.add_argument("--debug", action="store_true", help="show tracebacks")
        subparser.set_defaults(run=command.run)
    return parser


def _format_error(error: BaseException) -> str:
    """Return the message of an error on one line."""
    if not isinstance(error, _USER_ERRORS):
        text = " ".join(str(error).split())
        name = type(error).__name__
        return f"an error of jlora itself, {name}: {text}. Run it with --debug."
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}must be a file that can be opened, got: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
