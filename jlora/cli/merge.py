"""`jlora merge`: write a model folder with adapters merged in."""

from __future__ import annotations

import argparse

import jax

from jlora.checkpoints.merge_jobs import merge_checkpoint
from jlora.cli.job_options import (
    add_job_options,
    add_process,
    is_left_to_others,
    read_job_options,
    say_end,
)
from jlora.cli.output import say
from jlora.cli.targets import check_seed
from jlora.cli.wishes import split_weights


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora merge`, added to the other subcommands."""
    parser = commands.add_parser(
        "merge",
        help="write a model folder with PEFT adapters merged in",
        description=(
            "Adds the deltas of adapters to the weights of a checkpoint, tensor by "
            "tensor. The output is sharded like the input; what no adapter changes is "
            "copied byte for byte. A run that was interrupted goes on where it was."
        ),
    )
    add = parser.add_argument
    add("base", metavar="BASE", help="model folder, or .safetensors file")
    add(
        "adapters",
        metavar="ADAPTER[=WEIGHT]",
        nargs="+",
        help="folder of a PEFT adapter, and the factor of its delta (1)",
    )
    add("-o", "--output", metavar="DIR", required=True, help="folder to write")
    add(
        "--rounding",
        choices=("nearest", "stochastic"),
        default="nearest",
        help="how sums become bfloat16 or float16 (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of stochastic rounding (default: 0)")
    add_job_options(parser, has_layouts=True)
    add_process(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora merge`."""
    check_seed(arguments)
    is_random = arguments.rounding == "stochastic"
    report = merge_checkpoint(
        arguments.base,
        split_weights(arguments.adapters),
        arguments.output,
        rounding=arguments.rounding,
        key=jax.random.key(arguments.seed) if is_random else None,
        **read_job_options(arguments),
    )

    if is_left_to_others(arguments):
        return
    say_end(
        arguments,
        f"{len(report.changed)} tensors merged, {report.copied} copied, "
        f"{report.num_bytes} bytes",
    )
    if report.untied:
        say(f"{report.untied}: written apart from its embedding, which changed")
