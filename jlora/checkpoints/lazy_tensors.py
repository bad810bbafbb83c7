"""Arrays of a checkpoint that stand in a tree and are read when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jlora.adaptation.lazy_arrays import LazyArray

if TYPE_CHECKING:
    from jlora.checkpoints.checkpoint import Checkpoint


class LazyTensor(LazyArray):
    """An array of an open checkpoint, read from its file each time it is used."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.info(name)
        self._checkpoint = checkpoint
        self.name = name
        self.shape = info.shape
        self.dtype = np.dtype(info.dtype)
        self.nbytes = info.num_bytes

    def read(self) -> np.ndarray:
        """Return the values."""
        return self._checkpoint[self.name]
