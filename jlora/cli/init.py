"""`jlora init`: write the first factors of a model as an adapter."""

from __future__ import annotations

import argparse

import jax

from jlora.checkpoints.init_jobs import initialize_checkpoint
from jlora.cli.output import say
from jlora.cli.targets import check_seed, check_targets
from jlora.cli.wishes import add_output, say_lines


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
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=int, metavar="R", help="rank of every module")
    group.add_argument(
        "--energy", type=float, metavar="E", help="part of each weight to hold, (0, 1]"
    )
    add_output(parser)
    add(
        "--targets",
        metavar="REGEX",
        help="matrices to adapt (default: all but embeddings, heads and routers)",
    )
    add("--seed", type=int, default=0, help="of random factors (default: 0)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora init`."""
    check_seed(arguments)
    check_targets(arguments)
    report = initialize_checkpoint(
        arguments.checkpoint,
        arguments.output,
        method=arguments.method,
        rank=arguments.rank,
        energy=arguments.energy,
        targets=arguments.targets,
        portable=not arguments.keep_ranks,
        key=jax.random.key(arguments.seed),
    )
    say_lines(report)
    say(f"wrote {arguments.output}: {len(report.modules)} modules")
