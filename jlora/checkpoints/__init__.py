"""Files ↔ arrays."""

from jlora.checkpoints.arrays import load_arrays, save_arrays

__all__ = ["load_arrays", "save_arrays"]
