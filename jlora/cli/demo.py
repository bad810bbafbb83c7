"""`jlora demo`: the whole path, from pretraining to merged weights, in minutes."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora demo`, added to the other subcommands."""
    return commands.add_parser(
        "demo",
        help="pretrain a small language model, adapt it to another domain, compare",
        description=(
            "Pretrains a byte-level transformer on sources of the standard library. "
            "Adapts it to another domain: factorises its layers (A = U V), trains only "
            "V and rebuilds the weights. Compares that with classic LoRA and with full "
            "fine-tuning."
        ),
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora demo`."""
    del arguments
    # Imported in the call: the other commands need no model.
    from jlora.demo.story import run_demo

    run_demo()
