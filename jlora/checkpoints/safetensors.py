"""The safetensors format, bfloat16 included, as NumPy arrays.

The library's own NumPy reader knows no bfloat16, so the bytes are viewed here.
"""

import ml_dtypes
import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read_safetensors(path):
    """Return {name: array} of a file. ValueError names the file and what is wrong."""
    import safetensors  # where it is used: importing jlora is to cost next to nothing

    with open(path, "rb") as file:
        content = file.read()
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: must be a whole safetensors file, got one that cannot be read ({error}). "
            "Copy or download it again."
        ) from None
    return {name: _view(path, name, entry) for name, entry in entries}


def write_safetensors(file, arrays):
    """Write {name: array} to an open binary file."""
    import safetensors.numpy

    entries = {}
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise TypeError(
                f"`arrays` must have dtypes that safetensors knows, got {array.dtype} at {name}. "
                "Cast it, or write an .npz file."
            )
        entries[name] = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    # The metadata is what torch readers look for.
    file.write(safetensors.numpy.save(entries, metadata={"format": "pt"}))


def _view(path, name, entry):
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"{path}: must hold dtypes that NumPy knows, got {entry['dtype']} at {name}. "
            "Convert it first."
        )
    # A bytearray, so that the array can be written to.
    flat = np.frombuffer(bytearray(entry["data"]), dtype=_DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])
