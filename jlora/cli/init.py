"""`jlora init`: write the first factors of a model as an adapter."""

from __future__ import annotations

import argparse

import jax

from jlora.checkpoints.init_jobs import initialize_checkpoint
from jlora.cli.job_options import (
    add_job_options,
    add_process,
    is_left_to_others,
    read_job_options,
    say_end,
)
from jlora.cli.targets import check_seed, check_targets
from jlora.cli.wishes import add_max_rank, add_output, add_wish, read_wish, say_lines
from jlora.quantization.formats import FORMATS


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora init`, added to the other subcommands."""
    parser = commands.add_parser(
        "init",
        help="write the first factors of a model as a PEFT adapter",
        description=(
            "Writes DIR/adapter, and DIR/base if the method moves the weights: both "
            "together are the model. Train the adapter on that base."
        ),
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="model folder, or .safetensors file")
    add("--method", default="pissa", help="initializer (default: %(default)s)")
    add_wish(parser)
    add_max_rank(parser)
    add_output(parser)
    add(
        "--targets",
        metavar="REGEX",
        help="matrices to adapt (default: all but embeddings, heads and routers)",
    )
    add(
        "--quantize",
        metavar="FORMAT",
        choices=list(FORMATS),
        help="store the base in nf4, int8, int4 or fp8 (default: as the model)",
    )
    add("--seed", type=int, default=0, help="of random factors (default: 0)")
    add_job_options(parser, has_layouts=True)
    add_process(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora init`."""
    check_seed(arguments)
    check_targets(arguments)
    report = initialize_checkpoint(
        arguments.checkpoint,
        arguments.output,
        method=arguments.method,
        **read_wish(arguments),
        targets=arguments.targets,
        quantize=arguments.quantize,
        portable=not arguments.keep_ranks,
        **read_job_options(arguments),
        key=jax.random.key(arguments.seed),
    )

    if is_left_to_others(arguments):
        return
    say_lines(report)
    say_end(arguments, f"{len(report.modules)} modules")
