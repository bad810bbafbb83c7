"""`read_peft`: everything that an adapter in PEFT's files holds."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from jlora.checkpoints.peft_file import PeftFile, open_peft, read_finite
from jlora.factors import Factors


class PeftAdapter(NamedTuple):
    """Everything that an adapter of PEFT holds; `load_peft` returns the first two.

    Example:
        >>> import jlora
        >>> jlora.checkpoints.PeftAdapter._fields[:2]
        ('factors', 'config')
    """

    factors: dict[str, Factors]  # by the path of the module, with the scale folded in
    config: dict[str, Any]
    saved: dict[str, np.ndarray]  # parameters that replace the model's
    magnitudes: dict[str, np.ndarray]  # of DoRA, by module
    biases: dict[str, np.ndarray]  # added to the model's, by module, scaled
    tokens: dict[str, np.ndarray]  # new rows of an embedding, by module
    embeddings: frozenset[str] = frozenset()  # modules stored as embeddings


def read_peft(folder: str | os.PathLike[str]) -> PeftAdapter:
    """Return everything that a PEFT adapter holds, see `load_peft`.

    Raises:
        OSError, ValueError: as `load_peft`, except for parts that are no factors.

    Example:
        >>> import jax.numpy as jnp, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> delta = jlora.Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))
        >>> jlora.save_peft(folder.name, {"layers.0.up_proj": delta})
        >>> jlora.checkpoints.read_peft(folder.name).saved
        {}
        >>> folder.cleanup()
    """
    return read_adapter(open_peft(folder))


def read_adapter(file: PeftFile) -> PeftAdapter:
    """Return everything that an open adapter holds."""
    factors = {path: file.read(path) for path in file.modules}
    others = {
        part: {
            module: read_finite(file.checkpoint, name, file.checkpoint.path)
            for module, name in file.list_others(part).items()
        }
        for part in ("saved", "magnitude", "bias", "tokens")
    }
    for module, bias in others["bias"].items():
        if module not in file.modules:
            raise ValueError(
                f"{file.checkpoint.path}: must hold factors beside the bias of "
                f"{module}, got none. Save the adapter again."
            )
        others["bias"][module] = bias * np.float32(file.modules[module].scale)

    embeddings = {key.module for key in file.keys.values() if key.is_embedding}
    return PeftAdapter(
        factors,
        file.config,
        others["saved"],
        others["magnitude"],
        others["bias"],
        others["tokens"],
        frozenset(embeddings),
    )
