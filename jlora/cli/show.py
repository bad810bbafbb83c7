"""`jlora show`: what a file or folder holds, without reading the data."""

from __future__ import annotations

import argparse
import pathlib

from jlora.adaptation.tables import format_table
from jlora.checkpoints.checkpoint import open_checkpoint
from jlora.checkpoints.peft_config import (
    CONFIG_NAME,
    MODEL_NAME,
    find_scale,
    find_setting,
    read_config,
)
from jlora.checkpoints.peft_keys import parse_key
from jlora.cli.output import say
from jlora.cli.wishes import say_lines


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Return the parser of `jlora show`, added to the other subcommands."""
    parser = commands.add_parser(
        "show",
        help="print what a file, a model folder or an adapter holds",
        description=(
            "Prints names, shapes, dtypes and sizes of a file, a model folder or an "
            "Orbax checkpoint. The data is not read."
        ),
    )
    parser.add_argument("path", metavar="FILE_OR_FOLDER")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run `jlora show`."""
    path = pathlib.Path(arguments.path)
    if (path / CONFIG_NAME).is_file():
        _show_adapter(path)
    else:
        _show_checkpoint(path)


def _show_checkpoint(path: pathlib.Path) -> None:
    checkpoint = open_checkpoint(path)
    rows = [("name", "shape", "dtype", "bytes", "file")]
    for name in checkpoint:
        info = checkpoint.info(name)
        shape, size = _format_shape(info.shape), str(info.num_bytes)
        rows.append((name, shape, info.dtype, size, info.file.name))
    say_lines("\n".join(format_table(rows)))

    files = len(checkpoint.files)
    say(
        f"{path}: {len(checkpoint)} arrays, {checkpoint.num_bytes} bytes, {files} files"
    )


def _show_adapter(path: pathlib.Path) -> None:
    config, checkpoint = read_config(path), open_checkpoint(path / MODEL_NAME)
    rows, others = [("module", "inputs", "outputs", "rank", "scale", "dtype")], []
    keys = {name: parse_key(name) for name in checkpoint}
    shapes = {
        (key.module, key.part): checkpoint.info(name).shape
        for name, key in keys.items()
    }
    for name, key in keys.items():
        if key.part == "A":
            rank = int(find_setting(config, "r", key.module))
            outputs = shapes.get((key.module, "B"), ("none",))[0]
            scale = f"{find_scale(config, key.module, rank):.4g}"
            info = checkpoint.info(name)
            inputs = info.shape[-1] if len(info.shape) == 2 else "none"
            rows.append(
                (key.module, str(inputs), str(outputs), str(rank), scale, info.dtype)
            )
        elif key.part != "B":
            others.append(f"{key.module}: {key.part}, {checkpoint.info(name).shape}")
    say_lines("\n".join(format_table(rows)))
    say_lines("\n".join(others))
    base = config.get("base_model_name_or_path")
    say(f"{path}: {len(rows) - 1} modules, {checkpoint.num_bytes} bytes, base {base}")


def _format_shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
