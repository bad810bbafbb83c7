"""`QuantizedArray`: an array as codes of few bits and scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _checks
from jlora._sharding import follow_axes
from jlora._types import AnyArray, Array, DTypeLike, Float
from jlora.layouts import complete_layout, restore_layout, view_matrix
from jlora.quantization.base import Encoded, Format
from jlora.quantization.formats import as_format
from jlora.quantization.registry import register


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros"),
    meta_fields=("format", "dtype", "layout", "axes"),
)
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class QuantizedArray:
    """An array as codes of few bits and scales, a pytree node in its place.

    `quantize` makes one. It stands where a plain array stands as the base of an adapted
    weight. It is no array: `dequantize` returns one.

    The codes are rows, one for each output, with the inputs of the output side by side:
    for a kernel of JAX that is the transposed order. Leading axes are batch axes, so
    that `vmap`, `scan` and a sharding act on the fields as on a stack of matrices.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jlora.quantization.quantize(jnp.ones((256, 128)), "nf4")
        >>> w
        QuantizedArray(float32[256,128], nf4, 4.13 bits)
        >>> w.shape, w.nbytes
        ((256, 128), 16908)
    """

    codes: Any  # [*batch, n, bytes]
    scales: Any  # [*batch, n, k], or nested
    zeros: Any  # [*batch, n, k], or None
    format: Format
    dtype: np.dtype  # of the array that it stands for
    layout: str  # of the last axes, see `Rule`
    axes: tuple[int, ...]  # sizes of these axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that it stands for."""
        batch = self.codes.shape[:-2]
        num_named = self.layout.count("b")
        return (*batch[: len(batch) - num_named], *self.axes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def num_inputs(self) -> int:
        """Inputs m of the matrices [m, n]."""
        sizes = zip(self.layout, self.axes, strict=True)
        return math.prod(size for letter, size in sizes if letter == "i")

    @property
    def num_outputs(self) -> int:
        """Outputs n of the matrices [m, n]."""
        return self.codes.shape[-2]

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, ...]:
        """Return the array in its own shape and layout.

        Args:
            dtype: of the result. None: the dtype that it stands for.
        """
        from jlora.quantization.scales import read_scales  # on use, as the formats

        dtype = jax.dtypes.canonicalize_dtype(dtype or self.dtype)

        @follow_axes("*b n m", "*b n m", "*b n m", result=_find_axes(self.layout))
        def decode(codes: Array, scales: Any, zeros: Array | None) -> Array:
            encoded = Encoded(codes, read_scales(scales), zeros)
            rows = self.format.decode(encoded, self.num_inputs)
            if dtype == jnp.float16:
                # A level may be just above the largest number of float16.
                limit = float(jnp.finfo(dtype).max)
                rows = jnp.clip(rows, -limit, limit)
            return restore_layout(rows.astype(dtype).mT, self.layout, self.shape)

        return decode(self.codes, self.scales, self.zeros)

    def astype(self, dtype: DTypeLike) -> QuantizedArray:
        """Return the same codes, standing for an array of another dtype."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def view(self, layout: str, shape: Sequence[int]) -> QuantizedArray:
        """Return the same matrices as an array of another layout and shape.

        Args:
            layout: a letter for each axis.
            shape: in which each kind of axes is in the same order as before.
        """
        named = layout.lstrip("b")
        axes = tuple(shape[len(layout) - len(named) :])
        return dataclasses.replace(self, layout=named, axes=axes)

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # inside a transformation
            return f"QuantizedArray({self.format.label})"
        sizes = ",".join(map(str, self.shape))
        bits = 8 * self.nbytes / max(self.size, 1)
        name = f"{np.dtype(self.dtype).name}[{sizes}]"
        return f"QuantizedArray({name}, {self.format.label}, {bits:.2f} bits)"


register(QuantizedArray, QuantizedArray.dequantize)


def quantize(
    w: Float[AnyArray, ...], format: Format | str, *, layout: str = "io"
) -> QuantizedArray:
    """Return a weight as a `QuantizedArray` in a format of few bits.

    Args:
        w: float32, bfloat16 or float16 [..., m, n], or another layout.
        format: static, `nf4()`, `int8()`, `int4()` or `fp8()`, or its name.
        layout: static, of the last axes, see `Rule`. The scale of a block is shared by
            inputs of one output.

    Returns:
        `QuantizedArray`.

    Raises:
        TypeError: w is no floating array of 16 or 32 bits, or `format` no format.
        ValueError: an unknown name of a format, or fewer axes than the layout has.

    Accuracy: see the formats. NaN or Inf make their block NaN, and with nested scales
        its matrix. Blocks whose largest entry is below 1e-35 may become zero. Above
        1.7e38 a range of int4, and the rounding up of fp8, leave float32.

    Gradients: none; a quantised array is a constant.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> w = jnp.array([[127.0, -2.0], [1.4, 1.0]])
        >>> jlora.quantization.quantize(w, "fp8").dequantize().tolist()
        [[128.0, -2.0], [1.375, 1.0]]
    """
    format = as_format(format)
    _checks.check_floating(w, "w")
    if np.dtype(w.dtype).itemsize > 4:
        raise TypeError(
            f"`w` must be float32, bfloat16 or float16, got {w.dtype}. The scales hold "
            "32 bits; cast it first."
        )
    if w.ndim < len(layout):
        raise ValueError(
            f"`w` must have an axis for each letter of the layout {layout!r}, got "
            f"shape {tuple(w.shape)}. Check the layout."
        )
    dtype = np.dtype(w.dtype)
    encoded = _encode(jnp.asarray(w), format, layout)
    axes = tuple(w.shape[w.ndim - len(layout) :])
    codes, scales, zeros = encoded
    return QuantizedArray(codes, scales, zeros, format, dtype, layout, axes)


@functools.lru_cache(maxsize=1024)
def count_bytes(format: Format, shape: tuple[int, ...]) -> int:
    """Return the bytes of matrices [..., m, n] in a format."""
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    encoded = jax.eval_shape(functools.partial(format.encode, axis=-2), w)
    leaves = jax.tree.leaves(encoded)
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """The function from a matrix to the nearest one that a format can hold."""

    format: Format

    def __call__(self, w: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
        return quantize(w, self.format).dequantize()

    def __post_init__(self) -> None:
        # The name in labels of initializers, as a function has one.
        object.__setattr__(self, "__qualname__", self.format.label)


@functools.partial(jax.jit, static_argnames=("format", "layout"))
def _encode(w: Array, format: Format, layout: str) -> Encoded:
    layout = complete_layout(layout, w.ndim)
    run = follow_axes(_find_axes(layout), result="*b n m")(_encode_automatic)
    return run(w, format, layout)


def _find_axes(layout: str) -> str:
    """Return the axes of matrices in a layout, and none for other layouts."""
    return {"io": "*b m n", "oi": "*b n m"}.get(layout.lstrip("b"), "")


def _encode_automatic(w: Array, format: Format, layout: str) -> Encoded:
    # Read the weights in the order in which they are stored: a transposition of floats
    # takes longer than all the rest on a CPU.
    if layout.rindex("o") < layout.index("i"):
        return format.encode(view_matrix(w, layout).mT.astype(jnp.float32), -1)
    return format.encode(view_matrix(w, layout).astype(jnp.float32), -2)
