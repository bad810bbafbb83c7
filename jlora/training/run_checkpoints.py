"""Checkpoints of a training run, through orbax-checkpoint."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Array, PRNGKey, Tree
from jlora.training.monitor import StepEvaluation
from jlora.training.restored_arrays import replicate_others
from jlora.training.step_programs import TrainState


class Resumed(NamedTuple):
    """Where an earlier run of the same job stopped."""

    state: TrainState
    best: Tree | None  # trained arrays at the best evaluation
    records: dict[str, np.ndarray]  # losses and metrics of every step
    evaluations: list[StepEvaluation]
    num_batches: int  # that it had read
    iterator_state: Any


class RunCheckpoints:
    """The checkpoints of one run in a folder; the newest ones are kept.

    Args:
        folder: of the run; made if it does not exist.
        every: steps between two checkpoints.
        keep: how many to keep.
        job: {path: description} of the run; one of another job is refused.

    Raises:
        ImportError: orbax-checkpoint is not installed.
        OSError, ValueError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int,
        keep: int,
        job: Mapping[str, Any],
    ) -> None:
        self._path = pathlib.Path(folder).absolute()
        self.every = every
        self._job = {str(name): _plain(value) for name, value in job.items()}
        self._ocp = _import_orbax()
        self._is_closed = False
        _check_folder(self._path)
        options = self._ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
        )
        with _quiet():
            self._manager = self._ocp.CheckpointManager(self._path, options=options)

    def restore(self, state: TrainState) -> Resumed | None:
        """Return where the newest checkpoint stopped; None: there is none.

        Args:
            state: of the beginning, with the shapes and devices of all arrays.

        Raises:
            ValueError: it belongs to another job, with the first difference.
        """
        args = self._ocp.args
        step = self._manager.latest_step()
        if step is None:
            return None
        with _quiet():
            found = self._manager.restore(
                step, args=args.Composite(meta=args.JsonRestore())
            )
            self._check_job(found.meta["job"])
            meta = found.meta
            template = replicate_others(_flatten(state))
            if meta["has_best"]:
                template |= _flatten(state.trainable, "best/")
            template |= {
                name: np.zeros(shape, dtype) for name, shape, dtype in meta["records"]
            }
            found = self._manager.restore(
                step, args=args.Composite(arrays=args.StandardRestore(template))
            )
        arrays = found.arrays
        best = (
            _unflatten(state.trainable, arrays, "best/") if meta["has_best"] else None
        )
        records = {
            name.removeprefix("records/"): np.asarray(arrays[name])
            for name, _, _ in meta["records"]
        }
        return Resumed(
            _unflatten(state, arrays),
            best,
            records,
            [StepEvaluation(step, values) for step, values in meta["evaluations"]],
            meta["num_batches"],
            _decode(meta["iterator_state"]),
        )

    def save(self, resumed: Resumed) -> None:
        """Begin to write a checkpoint; training goes on meanwhile."""
        # Copies, because the next step donates these arrays.
        arrays = _flatten(jax.tree.map(jnp.copy, resumed.state))
        if resumed.best is not None:
            arrays |= _flatten(jax.tree.map(jnp.copy, resumed.best), "best/")
        records = {f"records/{name}": each for name, each in resumed.records.items()}
        meta = {
            "job": self._job,
            "has_best": resumed.best is not None,
            "records": [
                [name, list(each.shape), each.dtype.name]
                for name, each in records.items()
            ],
            "evaluations": [list(each) for each in resumed.evaluations],
            "num_batches": resumed.num_batches,
            "iterator_state": _encode(resumed.iterator_state),
        }
        args = self._ocp.args
        composite = args.Composite(
            arrays=args.StandardSave(arrays | records), meta=args.JsonSave(meta)
        )
        with _quiet(), self._naming():
            self._manager.save(resumed.num_batches, args=composite, force=True)

    def close(self) -> None:
        """Wait until all checkpoints are written; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        with _quiet(), self._naming():
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Make an error of orbax, also of an earlier save, one sentence."""
        try:
            yield
        except Exception as error:
            # Orbax names its own files first, and the reason last.
            text = " ".join(str(error).split())
            reason = text.rpartition(": ")[2] or type(error).__name__
            raise OSError(
                f"{self._path}: `checkpoint` must be written whole, got: {reason}. "
                "Free some space, or choose another folder."
            ) from error

    def _check_job(self, job: Mapping[str, Any]) -> None:
        for name in (*self._job, *job):
            now, before = self._job.get(name), job.get(name)
            if now != before:
                raise ValueError(
                    f"{self._path}: `checkpoint` must be a folder of this run, got one "
                    f"of another: {name} is {now or 'absent'} now and was "
                    f"{before or 'absent'}. Choose another folder."
                )


def describe_job(
    state: TrainState, frozen: Tree, key: PRNGKey | None, **settings: Any
) -> dict[str, Any]:
    """Return {path: description} that tells a run from others.

    It holds the shapes and dtypes of all trained arrays and of the optimiser's state,
    and a sum over the bits of each frozen array.
    """
    job = dict(settings)
    if key is not None:
        job["key"] = jax.random.key_data(key).tolist()
    for kind, tree in (
        ("trained", state.trainable),
        ("optimizer", state.opt_state),
        ("frozen", frozen),
    ):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = f"{kind}{jax.tree_util.keystr(path)}"
            job[name] = [list(np.shape(leaf)), str(jnp.result_type(leaf))]
            if kind == "frozen" and isinstance(leaf, jax.Array):
                job[name].append(int(_sum_bits(leaf)))
    return job


@jax.jit
def _sum_bits(leaf: Array) -> Array:
    """Return a sum over the bits of an array, modulo 2**32."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return jnp.sum(leaf, dtype=jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    size = leaf.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(leaf, width[size])
    flat = bits.reshape(-1).astype(jnp.uint32)
    # Weighted by place, so that two entries that change places are noticed.
    places = jax.lax.iota(jnp.uint32, flat.size) * jnp.uint32(2654435761) | 1
    return jnp.sum(flat * places, dtype=jnp.uint32)


def _flatten(tree: Tree, prefix: str = "state/") -> dict[str, Any]:
    """Return {name: array} of the leaves; keys of JAX as their numbers."""
    leaves = jax.tree.leaves(tree)
    return {
        f"{prefix}{i}": jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for i, leaf in enumerate(leaves)
    }


def _unflatten(tree: Tree, arrays: Mapping[str, Any], prefix: str = "state/") -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    found = []
    for i, leaf in enumerate(leaves):
        array = arrays[f"{prefix}{i}"]
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
        found.append(array)
    return jax.tree.unflatten(structure, found)


def _is_key(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array)
    return is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _encode(state: Any) -> Any:
    """Return the state of an iterator as JSON has it: bytes as text."""
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    return {"value": state}


def _decode(state: Any) -> Any:
    if "bytes" in state:
        return base64.b64decode(state["bytes"])
    return state["value"]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, list)) else repr(value)


def _check_folder(path: pathlib.Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: `checkpoint` must be a folder, got a file. Move it.")
    parent = path if path.exists() else path.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"{path}: `checkpoint` must be a folder that can be written to, got none. "
            "Choose another path."
        )


def _import_orbax() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import orbax.checkpoint
    except ImportError as error:
        raise ImportError(
            "`checkpoint` needs orbax-checkpoint, got an environment without it. "
            "Install jlora[train]."
        ) from error
    return orbax.checkpoint


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's warnings and log lines from the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
