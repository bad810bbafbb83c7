"""The `jlora` command: picks a subcommand, turns its errors into one line and exit code 2."""

import argparse
import os
import sys

from jlora.cli import adapt, demo, ranks

# What a user can cause. Anything else is a defect of jlora and shows its traceback.
_USER_ERRORS = (OSError, ValueError, TypeError, MemoryError)


def main(argv=None):
    """Run one command and return its exit code: 0 done, 2 refused, 130 interrupted."""
    # LAPACK's own threads fight those of XLA and slow small decompositions 10 to 100 times.
    # Set here, before the first decomposition loads LAPACK; a value that is set already stays.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = _build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except _USER_ERRORS as error:
        if arguments.debug:
            raise
        print(f"jlora {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"jlora {arguments.command}: interrupted, nothing more is written",
            file=sys.stderr,
        )
        return 130
    return 0


def _build_parser():
    parser = argparse.ArgumentParser(
        prog="jlora", description="Low-rank adaptation of large models in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, adapt, ranks):
        subparser = command.add_parser(commands)
        subparser.add_argument("--debug", action="store_true", help="show tracebacks")
        subparser.set_defaults(run=command.run)
    return parser


def _one_line(error):
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}must be a file that can be opened, got: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
