"""Factors padded with zeros to a larger rank, and the padding kept at zero."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jlora._types import Array, Int, Tree
from jlora.adaptation.adapted_weight import AdaptedWeight, is_adapted


def pad_weights(tree: Tree, rank: int) -> Tree:
    """Return the tree with all factors and cores padded with zeros to one rank.

    Halves from `split_trainable` are padded too: their missing arrays stay None.
    """
    pad = functools.partial(_pad_weight, rank=rank)
    return jax.tree.map(pad, tree, is_leaf=is_adapted)


def mask_padding(tree: Tree, rank: Int[Array, ""]) -> Tree:
    """Return the tree with exact zeros in the factors and cores beyond a traced rank.

    A NaN there becomes zero too. Other leaves are unchanged.
    """
    mask = functools.partial(_mask_weight, rank=rank)
    return jax.tree.map(mask, tree, is_leaf=is_adapted)


def _list_rank_axes(weight: AdaptedWeight) -> dict[str, tuple[int, ...]]:
    """Return {field: its axes of the length of the rank} for the arrays it has."""
    core = (-1,) if weight.trainable == "s" else (-2, -1)
    axes = {"u": (-1,), "v": (-2,), "core": core}
    return {
        name: own for name, own in axes.items() if getattr(weight, name) is not None
    }


def _pad_weight(leaf: Any, rank: int) -> Any:
    if not is_adapted(leaf):
        return leaf
    arrays = {}
    for name, axes in _list_rank_axes(leaf).items():
        array = jnp.asarray(getattr(leaf, name))
        padding = [(0, 0)] * array.ndim
        for axis in axes:
            padding[axis] = (0, rank - array.shape[axis])
        arrays[name] = jnp.pad(array, padding)
    return dataclasses.replace(leaf, **arrays)


def _mask_weight(leaf: Any, rank: Int[Array, ""]) -> Any:
    if not is_adapted(leaf):
        return leaf
    arrays = {}
    for name, axes in _list_rank_axes(leaf).items():
        array = getattr(leaf, name)
        for axis in axes:
            index = jax.lax.broadcasted_iota(rank.dtype, array.shape, axis % array.ndim)
            array = jnp.where(index < rank, array, jnp.zeros_like(array))
        arrays[name] = array
    return dataclasses.replace(leaf, **arrays)
