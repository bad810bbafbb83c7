"""Arrays of a checkpoint that stand in a tree and are read when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from jlora.adaptation.lazy_arrays import LazyArray
from jlora.checkpoints.float_weights import is_fp8

if TYPE_CHECKING:
    from jlora.checkpoints.checkpoint import Checkpoint


class LazyTensor(LazyArray):
    """An array of an open checkpoint, read from its file each time it is used."""

    _is_dequantized = False

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.info(name)
        self._checkpoint = checkpoint
        self.name = name
        self.shape = info.shape
        self.dtype = np.dtype(info.dtype)
        self.nbytes = info.num_bytes

    def read(self) -> np.ndarray:
        """Return the values."""
        if self._is_dequantized:
            return self._checkpoint.read_dequantized(self.name)
        return self._checkpoint[self.name]

    def dequantize(self) -> LazyTensor:
        """Return the tensor in float32 if it is stored in fp8, else itself."""
        if not is_fp8(self.dtype.name):
            return self
        found = LazyTensor(self._checkpoint, self.name)
        found._is_dequantized = True
        found.dtype = np.dtype(np.float32)
        found.nbytes = 4 * found.nbytes
        return found
