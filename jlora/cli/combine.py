"""`jlora combine`: write the weighted sum of adapters as one."""

from __future__ import annotations

import argparse

from jlora.checkpoints.adapter_jobs import combine_adapters
from jlora.cli.job_options import add_job_options, read_job_options, say_end
from jlora.cli.wishes import add_output, say_lines, split_weights


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora combine`, added to the other subcommands."""
    parser = commands.add_parser(
        "combine",
        help="write the weighted sum of PEFT adapters as one adapter",
        description=(
            "Adds the deltas of adapters, each times its weight, without cross terms. "
            "Without --rank the sum is exact, and the ranks add up."
        ),
    )
    parser.add_argument(
        "adapters",
        metavar="ADAPTER[=WEIGHT]",
        nargs="+",
        help="folder of a PEFT adapter, and the factor of its delta (1)",
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="cut the sum to this rank"
    )
    add_output(parser)
    add_job_options(parser, has_layouts=False)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora combine`."""
    report = combine_adapters(
        split_weights(arguments.adapters),
        arguments.output,
        rank=arguments.rank,
        portable=not arguments.keep_ranks,
        **read_job_options(arguments),
    )
    if arguments.rank is not None:
        say_lines(report)
    say_end(arguments, f"{len(report.modules)} modules")
