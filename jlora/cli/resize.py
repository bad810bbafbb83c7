"""`jlora resize`: write an adapter with smaller ranks."""

from __future__ import annotations

import argparse

from jlora.checkpoints.adapter_jobs import resize_adapter
from jlora.cli.job_options import add_job_options, read_job_options, say_end
from jlora.cli.wishes import add_output, add_wish, read_wish, say_lines


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora resize`, added to the other subcommands."""
    parser = commands.add_parser(
        "resize",
        help="write a PEFT adapter with smaller ranks",
        description=(
            "Truncates the delta of each module to its best approximation of a smaller "
            "rank, and prints what was kept."
        ),
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a PEFT adapter")
    add_wish(parser)
    add_output(parser)
    add_job_options(parser, has_layouts=False)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora resize`."""
    report = resize_adapter(
        arguments.adapter,
        arguments.output,
        **read_wish(arguments),
        portable=not arguments.keep_ranks,
        **read_job_options(arguments),
    )
    say_lines(report)
    say_end(arguments, f"{len(report.modules)} modules")
