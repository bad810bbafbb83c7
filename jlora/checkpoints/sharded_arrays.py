"""`load_sharded`: arrays of a checkpoint on devices, each process reading its part."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Sharding

from jlora._processes import raising_on_all
from jlora._types import Array
from jlora.checkpoints.checkpoint import Checkpoint

Shardings: TypeAlias = (
    Sharding | Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Sharding]
)


def load_sharded(checkpoint: Checkpoint, shardings: Shardings) -> dict[str, Array]:
    """Return arrays of a checkpoint on devices, sharded as asked.

    Use it for a model that is larger than one device or one host. Each process reads
    the bytes of its own devices, one array after the other, and no process holds a
    whole array unless it is replicated. The values are the stored ones: a weight in
    fp8 has its scale in another tensor.

    Args:
        checkpoint: from `open_checkpoint`. All processes must see the same files.
        shardings: one `jax.sharding.Sharding` for all arrays; or {name: sharding},
            which also says which arrays to load; or a function of (name, shape) that
            gives the sharding. Shapes are as stored: PyTorch's weights are
            [outputs, inputs].

    Returns:
        {name: JAX array} in the order of the mapping or of the checkpoint, with the
        stored dtypes.

    Raises:
        KeyError: a name that the checkpoint does not have.
        OSError, ValueError: a file has changed or is damaged. With devices of several
            processes, every process raises it.
        TypeError: something else than a sharding.
        ValueError: a sharding that does not fit the shape, such as an axis that the
            mesh does not divide; a dtype that JAX does not have or would round.

    Cost: the bytes of a block are read from .safetensors files; of .npy and .npz files
        and Orbax whole rows.

    Example:
        >>> import jax, numpy as np, tempfile, jlora
        >>> folder = tempfile.TemporaryDirectory()
        >>> arrays = {"w": np.ones((4, 2), np.float32)}
        >>> jlora.save_arrays(f"{folder.name}/w.safetensors", arrays)
        >>> checkpoint = jlora.checkpoints.open_checkpoint(folder.name)
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> rows = jax.NamedSharding(mesh, jax.P("model"))
        >>> jlora.checkpoints.load_sharded(checkpoint, rows)["w"].shape
        (4, 2)
        >>> folder.cleanup()
    """
    chosen = _list_shardings(checkpoint, shardings)
    for name, sharding in chosen.items():
        _check_dtype(checkpoint, name)
        _check_sharding(checkpoint, name, sharding)

    is_shared = not all(each.is_fully_addressable for each in chosen.values())
    with raising_on_all() if is_shared else contextlib.nullcontext():
        return {
            name: _load(checkpoint, name, sharding) for name, sharding in chosen.items()
        }


def _list_shardings(checkpoint: Checkpoint, shardings: Any) -> dict[str, Any]:
    """Return {name: sharding} of the arrays to load."""
    if isinstance(shardings, Mapping):
        chosen = dict(shardings)
    elif callable(shardings):
        chosen = {name: _call(shardings, checkpoint, name) for name in checkpoint}
    else:
        chosen = dict.fromkeys(checkpoint, shardings)

    for name, sharding in chosen.items():
        if not isinstance(sharding, Sharding):
            raise TypeError(
                f"{name}: `shardings` must give a jax.sharding.Sharding, got "
                f"{type(sharding).__name__}. Use jax.NamedSharding(mesh, spec)."
            )
    return chosen


def _call(rule: Callable, checkpoint: Checkpoint, name: str) -> Sharding:
    """Return the sharding that a user's function gives for an array."""
    shape = checkpoint.info(name).shape
    try:
        return rule(name, shape)
    except ValueError as error:  # of JAX: no such axis of the mesh
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: `shardings` must give a sharding for shape {shape}, got an "
            f"error: {reason}. Name axes of the mesh."
        ) from error


def _check_dtype(checkpoint: Checkpoint, name: str) -> None:
    """Refuse a dtype that an array of JAX cannot have."""
    info = checkpoint.info(name)
    try:
        dtype = np.dtype(info.dtype)
        is_kept = jax.dtypes.canonicalize_dtype(dtype) == dtype
    except TypeError:
        is_kept = False
    if not is_kept:
        raise ValueError(
            f"{info.file}: {name} must have a dtype that JAX keeps, got {info.dtype}. "
            "Set jax_enable_x64 for 64 bits, or leave it out of `shardings`."
        )


def _check_sharding(checkpoint: Checkpoint, name: str, sharding: Sharding) -> None:
    """Refuse a sharding that the shape of an array does not have."""
    shape = checkpoint.info(name).shape
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:
        found = str(sharding)
        if isinstance(sharding, jax.NamedSharding):
            found = f"{sharding.spec} on a mesh of {dict(sharding.mesh.shape)}"
        raise ValueError(
            f"{checkpoint.path}: `shardings` must divide {name} of shape {shape} into "
            f"equal parts, got {found}. Replicate the axis, or choose another mesh."
        ) from error


def _load(checkpoint: Checkpoint, name: str, sharding: Sharding) -> Array:
    shape, dtype = checkpoint.info(name).shape, np.dtype(checkpoint.info(name).dtype)
    # Replicas on several devices of this process share one read.
    read = functools.cache(functools.partial(_read, checkpoint, name))

    def read_index(index: Any) -> np.ndarray:
        return read(tuple((part.start, part.stop) for part in index))

    array = jax.make_array_from_callback(shape, sharding, read_index, dtype=dtype)
    return jax.block_until_ready(array)  # one array on the host at a time


def _read(
    checkpoint: Checkpoint, name: str, bounds: tuple[tuple[int | None, int | None], ...]
) -> np.ndarray:
    return checkpoint.read_slice(name, [slice(*each) for each in bounds])
