"""A tree of weights, some of them adapted: made, taken apart for training, merged."""

import dataclasses
import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import common_dtype
from jlora.adaptation.initialize import INITIALIZATIONS
from jlora.adaptation.plan import Plan
from jlora.adaptation.weights import map_leaves
from jlora.factors import Factors
from jlora.reconstruction.apply import apply_factors
from jlora.reconstruction.dense import reconstruct


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "u", "v", "scale"),
    meta_fields=("part", "columns", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight as base + scale * u @ v: a pytree node in the place of the plain array.

    Shapes: m inputs, n outputs, r rank, ... batch axes.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> w = jlora.adapt(params, plan, key=jax.random.key(0))["w"]
        >>> w.shape, w.u.shape, w.v.shape
        ((4, 3), (4, 1), (1, 3))
    """

    base: jax.Array | None  # [..., m, n] in the weight's dtype; None: dropped, w = scale * u @ v
    u: jax.Array  # [..., m, r] in the compute dtype
    v: jax.Array  # [..., r, n] in the compute dtype
    scale: jax.Array  # scalar
    part: str  # "v", "u" or "uv": what is trained
    columns: int | None  # of v, only the last so many columns are trained
    dtype: np.dtype  # of the weight

    @property
    def shape(self):
        """Shape of the weight it stands for, [..., m, n]."""
        return (*self.u.shape[:-1], self.v.shape[-1])

    @property
    def ndim(self):
        """Number of axes of the weight it stands for."""
        return self.u.ndim

    @property
    def factors(self):
        """The delta's `Factors`, without the scale."""
        return Factors(self.u, self.v)


def adapt(params, plan, *, key):
    """Return the tree with an AdaptedWeight in place of each weight of the plan.

    Other leaves are the same objects as before.

    Args:
        params: pytree of arrays that the plan was made for.
        plan: `Plan`, static.
        key: one typed PRNG key, consumed; folded with each path, so that no weight's numbers
            depend on which others there are.

    Returns:
        The tree. With the residual kept, base + scale * u @ v equals the weight to the rounding
        of the base's dtype.

    Raises:
        TypeError: `plan` is no Plan, or `key` no typed key.
        ValueError: the tree does not have a planned weight in its planned shape, or a weight
            holds NaN or Inf (with the path; not checked under jit).

    Cost: for each weight one decomposition, see `randomized_svd`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "b": jnp.zeros(6)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(1))
        >>> bool(abs(jlora.merge(adapted)["w"] - params["w"]).max() < 1e-5)
        True
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`plan` must be a jlora.Plan, got {type(plan).__name__}. Make one with make_plan."
        )
    _checks.check_key(key)
    entries = {entry.path: entry for entry in plan.entries}

    def adapt_leaf(path, leaf):
        entry = entries.pop(path, None)
        return leaf if entry is None else _adapt_weight(entry, leaf, key)

    adapted = map_leaves(adapt_leaf, params)
    if entries:
        raise ValueError(
            f"`params` must hold every path of the plan, got none at {', '.join(entries)}. "
            "Make the plan from this tree."
        )
    return adapted


def split_trainable(adapted, *, also_train=None):
    """Return (trainable, frozen): two trees of one structure, None where the other has a leaf.

    Of an AdaptedWeight the chosen part is trained. With `columns=k` the trainable tree holds
    the last k columns of v, and the frozen one the columns before them.

    Args:
        adapted: tree from `adapt`.
        also_train: regular expression on the paths of plain floating leaves to train as well
            (norms, biases, the whole model with ".*"). None: none of them.

    Returns:
        Two pytrees; `join` is the exact inverse.

    Raises:
        ValueError: nothing is left to train.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> trainable, frozen = jlora.split_trainable(
        ...     jlora.adapt(params, plan, key=jax.random.key(0)))
        >>> [leaf.shape for leaf in jax.tree.leaves(trainable)]
        [(1, 3)]
    """
    trained = map_leaves(functools.partial(_is_trained, also_train), adapted, is_leaf=is_adapted)
    trainable = jax.tree.map(_take_trainable, trained, adapted, is_leaf=is_adapted)
    frozen = jax.tree.map(_take_frozen, trained, adapted, is_leaf=is_adapted)
    if not jax.tree.leaves(trainable):
        raise ValueError(
            "`adapted` must hold something to train, got no adapted weight. "
            "Call jlora.adapt first, or name plain leaves with also_train."
        )
    return trainable, frozen


def join(trainable, frozen):
    """Return the tree that `split_trainable` took apart, bit for bit.

    Args:
        trainable, frozen: the two trees.

    Returns:
        The adapted tree.

    Raises:
        ValueError: the trees do not have one structure.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, columns=2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> jlora.join(*jlora.split_trainable(adapted))["w"].v.shape
        (1, 3)
    """
    return jax.tree.map(_join_leaf, trainable, frozen, is_leaf=_is_none_or_adapted)


def merge(adapted):
    """Return the tree of plain weights, base + scale * u @ v in each weight's own dtype.

    Args:
        adapted: tree from `adapt`.

    Returns:
        The tree that `adapt` was given, in structure and dtypes.

    Cost: one pass over each adapted weight.

    Accuracy: summed in at least float32, rounded once.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora"))
        >>> jlora.merge(jlora.adapt(params, plan, key=jax.random.key(0)))["w"].dtype
        dtype(bfloat16)
    """
    return jax.tree.map(_merge_leaf, adapted, is_leaf=is_adapted)


def linear(x, w):
    """Return x @ w for a plain weight or an AdaptedWeight.

    A model that multiplies its weights with this runs on the plain and on the adapted tree.

    Args:
        x: [..., t, m] activations.
        w: [..., m, n] array, or `AdaptedWeight` of that shape.

    Returns:
        [..., t, n] in the common dtype of x and the weight.

    Raises:
        TypeError, ValueError: as `apply_factors`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.linear(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
    """
    if not is_adapted(w):
        return jnp.matmul(x, w)
    y = apply_factors(x, w.factors, w.base, scale=w.scale, columns=w.columns)
    return y.astype(common_dtype(x.dtype, w.dtype))


def fold_path(key, path):
    """Return a key of this path's own: by its name, so that other paths change nothing."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def is_adapted(leaf):
    return isinstance(leaf, AdaptedWeight)


def _is_none_or_adapted(leaf):
    return leaf is None or is_adapted(leaf)


def _adapt_weight(entry, w, key):
    if tuple(w.shape) != entry.shape:
        raise ValueError(
            f"{entry.path}: `params` must have shape {entry.shape} here as in the plan, "
            f"got {tuple(w.shape)}. Make the plan from this tree."
        )
    w = _checks.check_matrix(w, entry.path)
    _checks.check_finite(w, entry.path)
    rule = entry.rule
    key = fold_path(key, entry.path)
    base, (u, v) = INITIALIZATIONS[rule.init](w, rule.rank, rule.scale, key)
    base = base if rule.residual else None
    scale = jnp.asarray(rule.scale, u.dtype)
    return AdaptedWeight(base, u, v, scale, rule.part, rule.columns, w.dtype)


def _is_trained(also_train, path, leaf):
    if is_adapted(leaf):
        return True
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return also_train is not None and is_float and re.search(also_train, path) is not None


def _take_trainable(trained, leaf):
    if not is_adapted(leaf):
        return leaf if trained else None
    u = leaf.u if "u" in leaf.part else None
    v = leaf.v[..., _first_trained_column(leaf) :] if "v" in leaf.part else None
    return dataclasses.replace(leaf, base=None, u=u, v=v, scale=None)


def _take_frozen(trained, leaf):
    if not is_adapted(leaf):
        return None if trained else leaf
    u = None if "u" in leaf.part else leaf.u
    v = leaf.v
    if "v" in leaf.part:
        first = _first_trained_column(leaf)
        v = leaf.v[..., :first] if first else None
    return dataclasses.replace(leaf, u=u, v=v)


def _first_trained_column(leaf):
    return 0 if leaf.columns is None else leaf.v.shape[-1] - leaf.columns


def _join_leaf(trainable, frozen):
    if not is_adapted(frozen):
        return frozen if trainable is None else trainable
    u = frozen.u if trainable.u is None else trainable.u
    halves = [v for v in (frozen.v, trainable.v) if v is not None]
    v = halves[0] if len(halves) == 1 else jnp.concatenate(halves, axis=-1)
    return dataclasses.replace(frozen, u=u, v=v)


def _merge_leaf(leaf):
    if not is_adapted(leaf):
        return leaf
    return reconstruct(leaf.factors, leaf.base, scale=leaf.scale, dtype=leaf.dtype)
