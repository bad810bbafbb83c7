"""Files ↔ arrays.

arrays       `load_arrays`, `save_arrays`: named arrays in .npy, .npz and .safetensors
safetensors  the safetensors format, with bfloat16
files        files that are written completely or not at all
"""

from jlora.checkpoints.arrays import load_arrays, save_arrays

__all__ = ["load_arrays", "save_arrays"]
