"""A tree of weights, some of them adapted: taken apart for training, multiplied, merged."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from jlora._numerics import common_dtype, matmul
from jlora.adaptation.paths import fold_path, map_leaves
from jlora.factors import Factors
from jlora.layouts import restore_layout, view_matrix
from jlora.reconstruction.apply import apply_factors
from jlora.reconstruction.dense import reconstruct
from jlora.reconstruction.rounding import check_rounding


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "u", "v", "scale", "core"),
    meta_fields=("trainable", "num_columns", "dtype", "layout", "axes"),
)
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A weight as base + scale * u @ v: a pytree node in the place of the plain array.

    Seen as a matrix [..., m, n]; the base lies as the weight did, in its own layout. With a core
    it is base + scale * u @ core @ v.

    Shapes: m inputs, n outputs, r rank, ... batch axes.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> w = jlora.adapt(params, plan, key=jax.random.key(0))["w"]
        >>> w.shape, w.u.shape, w.v.shape
        ((4, 3), (4, 1), (1, 3))
    """

    base: jax.Array | None  # as the weight, dtype too; None: dropped, w = scale * u @ v
    u: jax.Array  # [..., m, r] in the compute dtype
    v: jax.Array  # [..., r, n] in the compute dtype
    scale: jax.Array  # scalar
    trainable: str  # "v", "u", "uv", "core" or "s": what is trained
    num_columns: int | None  # of v, only the last so many columns are trained
    dtype: np.dtype  # of the weight
    core: jax.Array | None = (
        None  # [..., r, r], for part "s" [..., r] of a diagonal; None: none
    )
    layout: str = "io"  # of the base, see `Rule`
    axes: tuple[int, ...] | None = None  # sizes of the axes in `layout`; None: (m, n)

    @property
    def shape(self):
        """Shape of the weight it stands for, as it is stored."""
        batch, axes = self.u.shape[:-2], self.axes
        if axes is None:
            return (*batch, self.u.shape[-2], self.v.shape[-1])
        named = self.layout.count("b")
        return (*batch[: len(batch) - named], *axes)

    @property
    def ndim(self):
        """Number of axes of the weight it stands for."""
        return len(self.shape)

    @property
    def factors(self):
        """The delta's `Factors`, the core multiplied into u, without the scale."""
        if self.core is None:
            return Factors(self.u, self.v)
        if self.trainable == "s":
            return Factors(self.u * self.core[..., None, :], self.v)
        return Factors(matmul(self.u, self.core), self.v)


def split_trainable(adapted, *, also_train=None):
    """Return (trainable, frozen): two trees of one structure, None where the other has a leaf.

    Of an AdaptedWeight the chosen part is trained, for "core" and "s" its core. With `num_columns=k`
    the trainable tree holds the last k columns of v, and the frozen one the columns before them.

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
    trained = map_leaves(
        functools.partial(_is_trained, also_train), adapted, is_leaf=is_adapted
    )
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
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, num_columns=2))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> jlora.join(*jlora.split_trainable(adapted))["w"].v.shape
        (1, 3)
    """
    return jax.tree.map(_join_leaf, trainable, frozen, is_leaf=_is_none_or_adapted)


def merge(adapted, *, rounding="nearest", key=None):
    """Return the tree of plain weights, base + scale * u @ v in each weight's own dtype.

    Args:
        adapted: tree from `adapt`.
        rounding: static, how the sums become bfloat16 or float16, see `reconstruct`: "nearest",
            "stochastic" or "compensated". Weights of other dtypes are rounded to the nearest.
        key: one typed PRNG key for "stochastic", consumed; folded with each path. None: for the
            others.

    Returns:
        The tree that `adapt` was given, in structure, layouts and dtypes; NumPy arrays where the
        bases are. With rounding="compensated" a `CompensatedWeight` in place of each adapted
        weight of 16 bits.

    Raises:
        TypeError, ValueError: a key or a rounding as `reconstruct` refuses it.

    Cost: one pass over each adapted weight.

    Accuracy: summed in at least float32, rounded once.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3), jnp.bfloat16)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora"))
        >>> jlora.merge(jlora.adapt(params, plan, key=jax.random.key(0)))["w"].dtype
        dtype(bfloat16)
    """
    check_rounding(rounding, key, jnp.dtype(jnp.bfloat16))

    def merge_leaf(path, leaf):
        if not is_adapted(leaf):
            return leaf
        if jnp.finfo(leaf.dtype).bits != 16:
            return merge_weight(leaf)
        own_key = None if key is None else fold_path(key, path)
        return merge_weight(leaf, rounding=rounding, key=own_key)

    return map_leaves(merge_leaf, adapted, is_leaf=is_adapted)


def merge_weight(weight, **settings):
    """Return one `AdaptedWeight` as a plain array in its own layout."""
    matrix, factors, is_turned = view_stored(weight)
    dtype = jax.dtypes.canonicalize_dtype(weight.dtype)
    merged = reconstruct(factors, matrix, scale=weight.scale, dtype=dtype, **settings)

    def restore(part):
        part = (
            part.reshape(weight.shape)
            if is_turned
            else restore_layout(part, weight.layout, weight.shape)
        )
        is_on_host = isinstance(weight.base, np.ndarray) and not isinstance(
            part, jax.core.Tracer
        )
        return np.array(part, weight.dtype) if is_on_host else part

    return jax.tree.map(restore, merged)


def view_stored(weight):
    """Return (base, factors, is_turned): matrices of one orientation, at best without moving any.

    A weight that is stored outputs first is taken as the transpose of its view: its factors are
    turned, which costs nothing beside turning the base.
    """
    u, v = weight.factors
    kinds = weight.layout.lstrip("b")
    is_turned = kinds == "o" * kinds.count("o") + "i" * kinds.count("i")
    if is_turned:
        u, v = v.mT, u.mT
    base = weight.base
    if base is not None:
        shape = (*u.shape[:-1], v.shape[-1])
        base = base.reshape(shape) if is_turned else view_matrix(base, weight.layout)
    return base, Factors(u, v), is_turned


def linear(x, w):
    """Return x @ w for a plain weight or an AdaptedWeight.

    A model that multiplies its weights with this runs on the plain and on the adapted tree. One
    that does not can be run through `lift`.

    Args:
        x: [..., t, m] activations.
        w: [..., m, n] array, or `AdaptedWeight` of that shape, in the layout "io".

    Returns:
        [..., t, n] in the common dtype of x and the weight.

    Raises:
        TypeError, ValueError: as `apply_factors`; an adapted weight of another layout.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.linear(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
    """
    if not is_adapted(w):
        return jnp.matmul(x, w)
    if w.layout.lstrip("b") != "io":
        raise ValueError(
            f"`w` must have the layout 'io' to be multiplied by linear, got {w.layout!r}. "
            "Run the model through jlora.lift."
        )
    y = apply_factors(x, w.factors, w.base, scale=w.scale, num_columns=w.num_columns)
    return y.astype(common_dtype(x.dtype, w.dtype))


def is_adapted(leaf):
    return isinstance(leaf, AdaptedWeight)


def _is_none_or_adapted(leaf):
    return leaf is None or is_adapted(leaf)


def _is_trained(also_train, path, leaf):
    if is_adapted(leaf):
        return True
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return (
        also_train is not None and is_float and re.search(also_train, path) is not None
    )


def _take_trainable(trained, leaf):
    if not is_adapted(leaf):
        return leaf if trained else None
    u, v, core = leaf.u, leaf.v[..., _first_trained_column(leaf) :], leaf.core
    taken = {"u": {"u": u}, "v": {"v": v}, "uv": {"u": u, "v": v}}.get(
        leaf.trainable, {"core": core}
    )
    nothing = dict.fromkeys(("base", "u", "v", "scale", "core"))
    return dataclasses.replace(leaf, **nothing | taken)


def _take_frozen(trained, leaf):
    if not is_adapted(leaf):
        return None if trained else leaf
    if leaf.trainable in ("core", "s"):
        return dataclasses.replace(leaf, core=None)
    u = None if "u" in leaf.trainable else leaf.u
    v = leaf.v
    if "v" in leaf.trainable:
        first = _first_trained_column(leaf)
        v = leaf.v[..., :first] if first else None
    return dataclasses.replace(leaf, u=u, v=v)


def _first_trained_column(leaf):
    return 0 if leaf.num_columns is None else leaf.v.shape[-1] - leaf.num_columns


def _join_leaf(trainable, frozen):
    if not is_adapted(frozen):
        return frozen if trainable is None else trainable
    u = frozen.u if trainable.u is None else trainable.u
    core = frozen.core if trainable.core is None else trainable.core
    halves = [v for v in (frozen.v, trainable.v) if v is not None]
    v = halves[0] if len(halves) == 1 else jnp.concatenate(halves, axis=-1)
    return dataclasses.replace(frozen, u=u, v=v, core=core)
