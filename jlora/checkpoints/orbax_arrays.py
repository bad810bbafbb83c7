"""Orbax checkpoints, read through orbax itself: one leaf of the tree at a time."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora.checkpoints.json_files import read_json
from jlora.checkpoints.stored_arrays import FileState, check_unchanged, find_state

# Orbax's own names: of a tree, of the step that holds it, and of unfinished folders.
_TREE = "_METADATA"
_STEP = "_CHECKPOINT_METADATA"
_TEMPORARY = ".orbax-checkpoint-tmp"

# Items of a step in the order of preference; others must be named.
_ITEMS = ("default", "params")

# Errors of tensorstore repeat its whole configuration.
_MAX_REASON = 200


class OrbaxArray(NamedTuple):
    """A leaf of the tree in an Orbax checkpoint."""

    state: FileState  # of the file that describes the tree
    tree: Any  # what orbax knows of each leaf
    path: tuple[Any, ...]  # keys and indices from the root to the leaf
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    entry: None = None

    @property
    def file(self) -> pathlib.Path:
        return self.state.path.parent

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Return rows of the leaf, which is restored whole."""
        check_unchanged(self.state)
        array = _restore(self.file, self.tree, self.path)
        if (array.shape, array.dtype.name) != (self.shape, self.dtype):
            raise ValueError(
                f"{self.file}: must hold {'.'.join(map(str, self.path))} with shape "
                f"{self.shape} and dtype {self.dtype}, got {array.shape} and "
                f"{array.dtype.name}. Save the checkpoint again."
            )
        if not self.shape or last - first == self.shape[0]:
            return array
        return array[first:last].copy()  # which frees the other rows


def is_orbax(folder: pathlib.Path) -> bool:
    """Return whether a folder is a checkpoint of Orbax, or holds some.

    Weights of safetensors beside the folder of an Orbax checkpoint come first.
    """
    if _has_marker(folder):
        return True
    entries = list(folder.iterdir())
    if any(entry.suffix == ".safetensors" for entry in entries):
        return False
    return any(entry.is_dir() and _has_marker(entry) for entry in entries)


def list_orbax_arrays(folder: pathlib.Path) -> dict[str, OrbaxArray]:
    """Return {path of the leaf, joined with ".": array}; the data is not read.

    Raises:
        ImportError: orbax-checkpoint is not installed.
        OSError, ValueError: the checkpoint is unfinished or damaged, or the folder
            holds several.
    """
    item = _find_item(folder)
    state = find_state(item / _TREE)
    tree = _read_tree(item)

    arrays: dict[str, OrbaxArray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not _is_array(leaf):
            continue  # a string
        path = tuple(_get_key(key) for key in keys)
        name, dtype = ".".join(map(str, path)), np.dtype(leaf.dtype)
        if name in arrays:
            raise ValueError(
                f"{item}: must have one leaf of each name, got two called {name!r}. "
                "Rename one of them."
            )
        shape = tuple(int(n) for n in leaf.shape)
        num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        arrays[name] = OrbaxArray(state, tree, path, shape, dtype.name, num_bytes)
    return arrays


def _has_marker(folder: pathlib.Path) -> bool:
    is_marked = (folder / _TREE).is_file() or (folder / _STEP).is_file()
    return is_marked or _TEMPORARY in folder.name


def _find_item(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder of the tree: the given one, or one of the items of a step."""
    if (folder / _TREE).is_file():
        _check_finished(folder)
        return folder
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    items = {entry.name: entry for entry in entries if (entry / _TREE).is_file()}
    for name in (*_ITEMS, *(items if len(items) == 1 else ())):
        if name in items:
            _check_finished(items[name])
            return items[name]

    _check_finished(folder)
    names = list(items) or [e.name for e in entries if _TEMPORARY not in e.name]
    kind = "one tree" if items else "one step of a checkpoint"
    raise ValueError(
        f"{folder}: must be the folder of {kind}, got a folder with "
        f"{', '.join(names[:8]) or 'none'}. Name the folder itself."
    )


def _check_finished(folder: pathlib.Path) -> None:
    """Refuse a checkpoint that orbax has not committed."""
    folder = folder.absolute()
    is_finished = not any(_TEMPORARY in part for part in folder.parts)
    for step in (folder / _STEP, folder.parent / _STEP):
        if is_finished and step.is_file():
            times = read_json(step)  # of which some versions write neither
            has_begun = times.get("init_timestamp_nsecs") is not None
            has_ended = times.get("commit_timestamp_nsecs") is not None
            is_finished = has_ended or not has_begun

    if is_finished:
        orbax = _import_orbax(folder)
        is_finished = orbax.utils.is_checkpoint_finalized(str(folder))
    if not is_finished:
        raise ValueError(
            f"{folder}: must be a finished checkpoint, got one that orbax has not "
            "committed. Choose an earlier step."
        )


def _import_orbax(folder: pathlib.Path) -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(
            f"{folder}: orbax-checkpoint must be installed to read an Orbax "
            "checkpoint, got none. Install jlora[train]."
        ) from None
    return orbax.checkpoint


def _read_tree(item: pathlib.Path) -> Any:
    """Return the tree of a checkpoint with a description in the place of each leaf."""
    orbax = _import_orbax(item)
    with _naming(item), contextlib.closing(orbax.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(_make_path(item)).tree


def _restore(item: pathlib.Path, tree: Any, path: Sequence[Any]) -> np.ndarray:
    """Return one leaf of a checkpoint."""
    orbax = _import_orbax(item)
    wanted = _select(tree, path)
    settings = jax.tree.map(
        lambda leaf: orbax.RestoreArgs(restore_type=_choose_type(leaf)), wanted
    )
    arguments = orbax.args.PyTreeRestore(
        item=wanted, restore_args=settings, partial_restore=True
    )
    with _naming(item), contextlib.closing(orbax.PyTreeCheckpointHandler()) as handler:
        found = handler.restore(_make_path(item), args=arguments)
        for key in path:
            found = found[key]
        return np.require(found, requirements=["W"])


def _select(tree: Any, path: Sequence[Any]) -> Any:
    """Return the smallest tree with a leaf that orbax restores: lists are whole."""
    if not path or not isinstance(tree, dict):
        return tree
    return {path[0]: _select(tree[path[0]], path[1:])}


def _is_array(leaf: Any) -> bool:
    return getattr(leaf, "shape", None) is not None and leaf.dtype is not None


def _choose_type(leaf: Any) -> type | None:
    return np.ndarray if _is_array(leaf) else None


def _get_key(key: Any) -> Any:
    """Return the key or the index that an entry of a path of JAX stands for."""
    return key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key


def _make_path(folder: pathlib.Path) -> Any:
    from etils import epath  # which orbax depends on, and takes paths of

    return epath.Path(folder.absolute())


@contextlib.contextmanager
def _naming(item: pathlib.Path) -> Iterator[None]:
    """Make every error of orbax a ValueError that names the folder."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise ValueError(
            f"{item}: must be a whole Orbax checkpoint, got one that cannot be read "
            f"({reason}). Copy or save it again."
        ) from None
