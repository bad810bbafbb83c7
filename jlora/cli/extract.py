"""`jlora extract`: write the difference of two checkpoints as an adapter."""

from __future__ import annotations

import argparse

import jax

from jlora.checkpoints.extract_jobs import extract_checkpoint
from jlora.cli.job_options import (
    add_job_options,
    add_process,
    is_left_to_others,
    read_job_options,
    say_end,
)
from jlora.cli.targets import add_targets, check_seed, check_targets
from jlora.cli.wishes import add_max_rank, add_output, add_wish, read_wish, say_lines


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora extract`, added to the other subcommands."""
    parser = commands.add_parser(
        "extract",
        help="write the difference of two checkpoints as a PEFT adapter",
        description=(
            "Subtracts the matrices of BASE from those of TUNED in float32, truncates "
            "each difference to its leading singular triplets, and prints a table."
        ),
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="model folder, or .safetensors file")
    add("tuned", metavar="TUNED", help="the same model after fine-tuning")
    add_wish(parser)
    add_max_rank(parser)
    add_output(parser)
    add_targets(parser, "extract")
    add(
        "--modules-to-save",
        metavar="REGEX",
        help="store these whole if they changed: norms, embeddings, heads",
    )
    add("--seed", type=int, default=0, help="of the random projections (default: 0)")
    add_job_options(parser, has_layouts=True)
    add_process(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora extract`."""
    check_targets(arguments)
    check_seed(arguments)
    report = extract_checkpoint(
        arguments.base,
        arguments.tuned,
        arguments.output,
        **read_wish(arguments),
        targets=arguments.targets,
        modules_to_save=arguments.modules_to_save,
        portable=not arguments.keep_ranks,
        **read_job_options(arguments),
        key=jax.random.key(arguments.seed),
    )

    if is_left_to_others(arguments):
        return
    say_lines(report)
    say_end(arguments, f"{len(report.modules)} modules")
