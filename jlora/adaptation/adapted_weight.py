"""`AdaptedWeight`: base + scale * u @ v in the place of a plain array."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._numerics import common_dtype, matmul
from jlora._types import AnyArray, Array, DTypeLike, Float
from jlora.adaptation.refused_operations import RefusedArray, add_refusals, refuse
from jlora.factors import Factors
from jlora.layouts import view_matrix
from jlora.quantization.quantized_array import QuantizedArray
from jlora.quantization.registry import read_array
from jlora.reconstruction.apply import apply_factors


@add_refusals
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "u", "v", "scale", "core"),
    meta_fields=("trainable", "num_columns", "dtype", "layout", "axes"),
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class AdaptedWeight:
    """A weight as base + scale * u @ v, a pytree node in the place of the plain array.

    It is read as a matrix [..., m, n] of m inputs and n outputs; the base keeps the
    layout of the stored weight. With a core it is base + scale * u @ core @ v.

    `x @ w` works and is `jlora.linear(x, w)`. Every other operation raises: run a model
    that transposes, reshapes or slices its weights through `jlora.lift`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3), jnp.float32)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1))
        >>> w = jlora.adapt(params, plan, key=jax.random.key(0))["w"]
        >>> w
        float32[4,3] = base + scale · u[4,1] @ v[1,3], trainable="v"
        >>> (jnp.ones((2, 4)) @ w).shape
        (2, 3)
    """

    base: Any  # array as the weight was stored, or None: dropped, w = scale * u @ v
    u: Float[Array, "*batch m r"]  # in the compute dtype
    v: Float[Array, "*batch r n"]  # in the compute dtype
    scale: Float[Array, ""]
    trainable: str  # "v", "u", "uv", "core" or "s"
    num_columns: int | None  # only the last so many columns of v are trained
    dtype: np.dtype  # of the weight, and of a base that is a plain array
    core: Array | None = None  # [*batch, r, r], or for "s" the diagonal [*batch, r]
    layout: str = "io"  # of the base, see `Rule`
    axes: tuple[int, ...] | None = None  # sizes of the axes in `layout`; None: (m, n)

    def __post_init__(self) -> None:
        # A cast of all leaves of a tree casts the base, and changes no static field.
        base = self.base
        is_array = isinstance(base, (jax.Array, np.ndarray, QuantizedArray))
        if is_array and _checks.is_floating(base.dtype) and base.dtype != self.dtype:
            object.__setattr__(self, "dtype", np.dtype(base.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored weight."""
        batch, axes = self.u.shape[:-2], self.axes
        if axes is None:
            return (*batch, self.u.shape[-2], self.v.shape[-1])
        num_named = self.layout.count("b")
        return (*batch[: len(batch) - num_named], *axes)

    @property
    def ndim(self) -> int:
        """Number of axes of the stored weight."""
        return len(self.shape)

    @property
    def factors(self) -> Factors:
        """The delta's `Factors`, with the core multiplied into u, without the scale."""
        if self.core is None:
            return Factors(self.u, self.v)
        if self.trainable == "s":
            return Factors(self.u * self.core[..., None, :], self.v)
        return Factors(matmul(self.u, self.core), self.v)

    def __repr__(self) -> str:
        base = "" if self.base is None else "base + "
        names = {"s": "diag(s)", "core": "core"}
        middle = "" if self.core is None else f"{names[self.trainable]} @ "

        columns = ""
        if self.num_columns is not None:
            columns = f", num_columns={self.num_columns}"
        layout = "" if self.layout == "io" else f', layout="{self.layout}"'
        return (
            f"{self._describe_array()} = {base}scale · u{_describe_shape(self.u)} @ "
            f"{middle}v{_describe_shape(self.v)}, "
            f'trainable="{self.trainable}"{columns}{layout}'
        )

    def _describe_array(self) -> str:
        # A half of `split_trainable` has no u or no v, and so no shape.
        is_whole = all(hasattr(part, "shape") for part in (self.u, self.v))
        sizes = ",".join(map(str, self.shape)) if is_whole else "..."
        return f"{np.dtype(self.dtype).name}[{sizes}]"

    # `x @ w` is the product; all else is refused in one sentence. NumPy asks
    # __array_ufunc__ for its operators and functions, JAX asks __jax_array__.

    def __rmatmul__(self, x: AnyArray) -> Array:
        return linear(jnp.asarray(x), self)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs) -> Array:
        is_product = ufunc is np.matmul and method == "__call__" and not kwargs
        if is_product and inputs[1] is self and inputs[0] is not self:
            return linear(jnp.asarray(inputs[0]), self)
        refuse(f"np.{ufunc.__name__}(...)")

    def __array__(self, *args, **kwargs) -> NoReturn:
        refuse("a conversion to an array")

    def __jax_array__(self) -> RefusedArray:
        return RefusedArray()

    @property
    def T(self) -> NoReturn:  # noqa: N802 (the name of the attribute of arrays)
        """Raises; see `AdaptedWeight`."""
        refuse("w.T")

    @property
    def mT(self) -> NoReturn:  # noqa: N802
        """Raises; see `AdaptedWeight`."""
        refuse("w.mT")


def linear(x: Float[AnyArray, ...], w: Any) -> Array:
    """Return x @ w for a plain weight or an `AdaptedWeight`.

    A model that multiplies its weights with this, or with `@`, runs on the plain and on
    the adapted tree. Run any other model through `lift`.

    Args:
        x: activations [..., t, m].
        w: [..., m, n] array, or an `AdaptedWeight` of that shape in the layout "io".

    Returns:
        [..., t, n] in the common dtype of x and the weight.

    Raises:
        TypeError, ValueError: as `apply_factors`, or an adapted weight of another
            layout.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.linear(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
    """
    if not is_adapted(w):
        return jnp.matmul(x, w)
    if w.layout.lstrip("b") != "io":
        raise ValueError(
            "`w` must have the layout 'io' to be multiplied by linear, got "
            f"{w.layout!r}. Run the model through jlora.lift."
        )

    dtype = common_dtype(x.dtype, w.dtype)
    base = read_product_base(w)
    y = apply_factors(x, w.factors, base, scale=w.scale, num_columns=w.num_columns)
    return y.astype(dtype)


def read_base(weight: AdaptedWeight, dtype: DTypeLike | None = None) -> Any:
    """Return the base of a weight as a plain array in the layout it is stored in.

    Every reader of a base calls this, so that a base may be an array of any registered
    type, such as a quantised one.

    Args:
        weight: one with a base.
        dtype: of the result. None: the dtype of the weight.

    Returns:
        Array in the shape and layout of the stored weight.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jnp.ones((4, 3))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 1, init="lora"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> jlora.adaptation.read_base(adapted["w"]).shape
        (4, 3)
    """
    return read_array(weight.base, dtype)


def read_product_base(weight: AdaptedWeight) -> Any:
    """Return the base for products: as `read_base`, but a quantised one unread."""
    if weight.base is None or isinstance(weight.base, QuantizedArray):
        return weight.base
    return read_base(weight)


class MatrixView(NamedTuple):
    """Base and factors of a weight as matrices of one orientation."""

    base: Any  # [..., m, n], or [..., n, m] if transposed; None: no base
    factors: Factors
    is_transposed: bool


def view_matrices(weight: AdaptedWeight) -> MatrixView:
    """Return base and factors as matrices, without copying the base if possible.

    For a weight stored as [outputs, inputs] we transpose the factors, which are small,
    instead of the base.
    """
    u, v = weight.factors
    kinds = weight.layout.lstrip("b")
    is_transposed = kinds == "o" * kinds.count("o") + "i" * kinds.count("i")
    if is_transposed:
        u, v = v.mT, u.mT
    if weight.base is None:
        return MatrixView(None, Factors(u, v), is_transposed)

    base = read_base(weight)
    if is_transposed:
        base = base.reshape((*u.shape[:-1], v.shape[-1]))
    else:
        base = view_matrix(base, weight.layout)
    return MatrixView(base, Factors(u, v), is_transposed)


def is_adapted(leaf: Any) -> bool:
    """Return whether a leaf of a tree is an `AdaptedWeight`."""
    return isinstance(leaf, AdaptedWeight)


def _describe_shape(array: Any) -> str:
    shape = getattr(array, "shape", None)
    return "[...]" if shape is None else f"[{','.join(map(str, shape))}]"
