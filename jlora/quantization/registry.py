"""Array types of other libraries as bases of adapted weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jlora._types import Array, DTypeLike


def register(array_type: type, dequantize: Callable[[Any], Array]) -> None:
    """Let arrays of another type be the bases of adapted weights.

    qwix's `QArray` is known already, also within the `WithAux` of a Linen model.

    Afterwards such an array may stand as a leaf of the tree that `make_plan` and
    `adapt` get, with an initializer that leaves the base unchanged ("lora", "eva",
    ...). The base stays the same object. `linear`, `lift`, `merge` and `diagnose` read
    it through `dequantize`, inside the compiled program.

    Args:
        array_type: a pytree node with `shape`, `ndim` and a floating `dtype`, the dtype
            of the weight that it stands for.
        dequantize: function from such an array to a plain array of its shape. It must
            be traceable.

    Raises:
        TypeError: `array_type` is no class, or `dequantize` no function.

    Example:
        >>> import dataclasses, functools, jax, jax.numpy as jnp, jlora
        >>> @functools.partial(
        ...     jax.tree_util.register_dataclass,
        ...     data_fields=("codes", "step"), meta_fields=())
        ... @dataclasses.dataclass(frozen=True)
        ... class Int8:
        ...     codes: jax.Array
        ...     step: jax.Array
        ...     shape = property(lambda self: self.codes.shape)
        ...     ndim = property(lambda self: self.codes.ndim)
        ...     dtype = property(lambda self: self.step.dtype)
        >>> jlora.quantization.register(Int8, lambda a: a.codes * a.step)
        >>> params = {"w": Int8(jnp.ones((4, 3), jnp.int8), jnp.float32(0.5))}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, init="lora"))
        >>> adapted = jlora.adapt(params, plan, key=jax.random.key(0))
        >>> jlora.merge(adapted)["w"][0].tolist()
        [0.5, 0.5, 0.5]
    """
    if not isinstance(array_type, type):
        raise TypeError(
            f"`array_type` must be a class, got {type(array_type).__name__}. "
            "Pass the type of the arrays."
        )
    if not callable(dequantize):
        raise TypeError(
            f"`dequantize` must be a function of one array, got "
            f"{type(dequantize).__name__}. Pass one."
        )
    _dequantize.register(array_type, dequantize)


def is_registered(value: Any) -> bool:
    """Return whether the value is an array of a registered type."""
    array_type = type(value)
    if _dequantize.dispatch(array_type) is not _dequantize.dispatch(object):
        return True
    # Such an array exists only where qwix is imported already.
    name = array_type.__name__
    if name in _QWIX and array_type.__module__.startswith("qwix."):
        register(array_type, _QWIX[name])
        return True
    return False


def read_array(array: Any, dtype: DTypeLike | None = None) -> Any:
    """Return a plain array: the values of a registered array, or the array itself.

    Args:
        array: a plain array of JAX or NumPy, or one of a registered type.
        dtype: of the result. None: a plain array keeps its own; a registered one gets
            the dtype that it stands for.
    """
    if is_registered(array):
        return jnp.asarray(_dequantize(array), array.dtype if dtype is None else dtype)
    return array if dtype is None else array.astype(dtype)


def _dequantize_qwix(array: Any) -> Array:
    import qwix

    return qwix.dequantize(array)


def _dequantize_with_aux(array: Any) -> Array:
    value = array.array  # a `QArray`, or a plain array that is not quantised yet
    return _dequantize_qwix(value) if is_registered(value) else value


_QWIX = {"QArray": _dequantize_qwix, "WithAux": _dequantize_with_aux}


@functools.singledispatch
def _dequantize(array: Any) -> Array:
    raise TypeError(
        f"`array` must be of a registered type, got {type(array).__name__}. "
        "Call jlora.quantization.register first."
    )
