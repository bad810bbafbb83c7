"""Arrays of a checkpoint that stand in a tree and are read when they are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.checkpoints.checkpoint import Checkpoint


class LazyTensor:
    """An array of an open checkpoint, read from its file each time it is used.

    `np.asarray(tensor)` reads it. Nothing is kept.

    Example:
        >>> import numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> jlora.save_arrays(f"{folder.name}/w.safetensors", {"w": np.eye(3)})
        >>> checkpoint = jlora.checkpoints.open_checkpoint(folder.name)
        >>> tensor = jlora.checkpoints.LazyTensor(checkpoint, "w")
        >>> tensor, np.asarray(tensor).sum()
        (LazyTensor('w', float64[3,3]), np.float64(3.0))
        >>> folder.cleanup()
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint = checkpoint
        self.name = name
        info = checkpoint.info(name)
        self.shape = info.shape
        self.nbytes = info.num_bytes
        self._dtype = info.dtype

    @property
    def dtype(self) -> np.dtype:
        """The stored dtype."""
        return np.dtype(self._dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._checkpoint[self.name]
        return array if dtype is None else array.astype(dtype)

    def __repr__(self) -> str:
        sizes = ",".join(map(str, self.shape))
        return f"LazyTensor({self.name!r}, {self._dtype}[{sizes}])"
