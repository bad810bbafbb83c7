"""The adapted trees of several ranks, padded and stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._types import Array, PRNGKey, Tree
from jlora.adaptation.batching import adapt
from jlora.adaptation.plan import Plan
from jlora.adaptation.weight_trees import split_trainable
from jlora.training.padding import pad_weights


class FrozenLayout(NamedTuple):
    """How a frozen tree is put together from its leaves; static."""

    structure: Any  # of the tree
    is_shared: tuple[bool, ...]  # for each leaf: whether all ranks have the same one

    def join(self, moved: list[Array], shared: list[Array]) -> Tree:
        """Return the frozen tree of the leaves of one rank and the shared ones."""
        sources = {True: iter(shared), False: iter(moved)}
        leaves = [next(sources[is_shared]) for is_shared in self.is_shared]
        return jax.tree.unflatten(self.structure, leaves)

    def divide(self, frozen: Tree) -> tuple[list[Array], list[Array]]:
        """Return (moved, shared), the two lists of leaves of a frozen tree."""
        pairs = list(zip(self.is_shared, jax.tree.leaves(frozen), strict=True))
        moved = [leaf for is_shared, leaf in pairs if not is_shared]
        return moved, [leaf for is_shared, leaf in pairs if is_shared]


class StackedTrees(NamedTuple):
    """Initial trees of several ranks; the leading axis is the rank, except in shared.

    The leaves may be abstract, jax.ShapeDtypeStruct.
    """

    trainable: Tree
    moved: list[Any]  # frozen leaves that differ by rank
    shared: list[Any]  # frozen leaves of all ranks, stored once


class RankTrees:
    """The adapted trees of several ranks, each made on its first use."""

    def __init__(
        self,
        params: Tree,
        plans: Sequence[Plan],
        *,
        key: PRNGKey,
        data: Tree | None,
        also_train: str | None,
    ) -> None:
        # NumPy arrays are sent to the device once, and not for each rank or step.
        self._params = jax.tree.map(_to_device, params)
        self._plans = plans
        self._key = key
        self._data = data
        self._also_train = also_train
        self._kept: dict[int, Tree] = {}
        self._given = {id(leaf) for leaf in jax.tree.leaves(self._params)}

    def adapt(self, index: int) -> Tree:
        """Return the adapted tree of one rank, and keep it until it is stacked."""
        if index not in self._kept:
            self._kept[index] = adapt(
                self._params,
                self._plans[index],
                key=self._key,
                data=self._data,
                progress=False,
            )
        return self._kept[index]

    def split(self, index: int, rank: int) -> tuple[Tree, Tree]:
        """Return (trainable, frozen) of one rank, padded to another."""
        padded = pad_weights(self.adapt(index), rank)
        return split_trainable(padded, also_train=self._also_train)

    def find_layout(self, frozen: Tree) -> FrozenLayout:
        """Return the layout of a frozen tree: leaves of the given tree are shared."""
        leaves, structure = jax.tree.flatten(frozen)
        return FrozenLayout(
            structure, tuple(id(leaf) in self._given for leaf in leaves)
        )

    def describe(
        self, index: int, rank: int, num_ranks: int
    ) -> tuple[StackedTrees, FrozenLayout]:
        """Return the abstract stack of some ranks with the shapes of one of them."""
        trainable, frozen = self.split(index, rank)
        layout = self.find_layout(frozen)
        moved, shared = layout.divide(frozen)

        def describe_stack(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (num_ranks, *jnp.shape(leaf))
            return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))

        trainable, moved = jax.tree.map(describe_stack, (trainable, moved))
        return StackedTrees(trainable, moved, shared), layout

    def stack(
        self, indices: Sequence[int], rank: int, layout: FrozenLayout
    ) -> StackedTrees:
        """Return the trees of some ranks, padded and stacked; they are kept no more."""
        trainable, moved, shared = [], [], []
        for index in indices:
            own_trainable, frozen = self.split(index, rank)
            own_moved, shared = layout.divide(frozen)
            self._check_shared(shared)
            trainable.append(own_trainable)
            moved.append(own_moved)

        for index in indices:
            self._kept.pop(index, None)
        return StackedTrees(_stack(trainable), _stack(moved), shared)

    def _check_shared(self, shared: list[Any]) -> None:
        if any(id(leaf) not in self._given for leaf in shared):
            raise ValueError(
                "`rules` must have an initializer that changes a base at every rank or "
                "at none, got one that does so at some ranks. Cross-validate these "
                "ranks in two calls."
            )


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(
        lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *trees
    )


def _to_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
