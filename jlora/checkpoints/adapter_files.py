"""The two files of an adapter, written so that a reader finds both or neither."""

from __future__ import annotations

import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jlora.checkpoints.adapter_layout import AdapterLayout, write_factors
from jlora.checkpoints.files import replace_file
from jlora.checkpoints.json_files import write_json
from jlora.checkpoints.output_folder import OutputFolder
from jlora.checkpoints.peft_config import CONFIG_NAME, MODEL_NAME
from jlora.factors import Factors


def write_adapter(
    folder: pathlib.Path,
    layout: AdapterLayout,
    read: Callable[[str], Factors],
    config: Mapping[str, Any],
) -> None:
    """Write the tensors and the configuration of an adapter to a folder.

    A folder that does not exist appears with both files. In one that exists each file
    is replaced, the configuration last.

    Args:
        folder: to write to.
        layout: of the adapter.
        read: gives the factors of a module, each once, in the order of the layout.
        config: more entries for the configuration.

    Raises:
        OSError, ValueError: the folder cannot be made or written to.
    """
    if folder.exists() or folder.is_symlink():
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: must be a folder or a new path, got a file. Choose another."
            )
        _write_files(folder, layout, read, config)
        return

    # Beside the folder, so that a rename is enough.
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ValueError(
            f"{folder}: must lie in a folder that exists, got none. Make it first."
        )
    partial = parent / f".{secrets.token_hex(8)}.partial"
    partial.mkdir()
    try:
        _write_files(partial, layout, read, config)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_job_adapter(
    folder: OutputFolder,
    layout: AdapterLayout,
    read: Callable[[str], Factors],
    *,
    saved: Mapping[str, Any] = MappingProxyType({}),
    config: Mapping[str, Any] = MappingProxyType({}),
    prefix: str = "",
) -> None:
    """Write an adapter into the folder of a job, one module in memory at a time.

    Args:
        folder: of the job.
        layout: of the adapter.
        read: gives the factors of a module.
        saved: whole parameters to store beside them, by name; read when written.
        config: more entries for the configuration.
        prefix: path of the adapter in the folder, with a last "/".
    """
    content = {**layout.config, **config}
    folder.write(
        prefix + MODEL_NAME, lambda file: write_factors(file, layout, read, saved)
    )
    folder.write(prefix + CONFIG_NAME, lambda file: write_json(file, content))


def _write_files(
    folder: pathlib.Path,
    layout: AdapterLayout,
    read: Callable[[str], Factors],
    config: Mapping[str, Any],
) -> None:
    with replace_file(folder / MODEL_NAME) as file:
        write_factors(file, layout, read, {})
    with replace_file(folder / CONFIG_NAME) as file:
        write_json(file, {**layout.config, **config})
