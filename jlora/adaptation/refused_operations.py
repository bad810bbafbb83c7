"""Operations on an `AdaptedWeight` that raise one sentence instead of JAX's."""

from __future__ import annotations

from typing import NoReturn


def refuse(operation: str) -> NoReturn:
    """Raise the sentence that names the operation and the way out."""
    raise TypeError(
        f"`w` must be used as `x @ w`, got {operation} on an AdaptedWeight. Run the "
        "model through jlora.lift, or rebuild the weights with jlora.merge."
    )


class RefusedArray:
    """Stands for a weight that a function of JAX asked for, and raises when looked at.

    `jax.Array @ w` asks too; it does not look, and calls `AdaptedWeight.__rmatmul__`.
    """

    def __getattr__(self, name: str) -> NoReturn:
        refuse("a function of JAX")

    def __repr__(self) -> str:
        # JAX prints an argument that is no array.
        refuse("a function of JAX")


def _make_refusal(example: str):
    def operator(self, *args, **kwargs) -> NoReturn:
        refuse(example)

    return operator


_REFUSED = {
    "__matmul__": "w @ x",
    "__add__": "w + x",
    "__radd__": "x + w",
    "__sub__": "w - x",
    "__rsub__": "x - w",
    "__mul__": "w * x",
    "__rmul__": "x * w",
    "__truediv__": "w / x",
    "__rtruediv__": "x / w",
    "__floordiv__": "w // x",
    "__rfloordiv__": "x // w",
    "__mod__": "w % x",
    "__rmod__": "x % w",
    "__pow__": "w ** x",
    "__rpow__": "x ** w",
    "__neg__": "-w",
    "__pos__": "+w",
    "__abs__": "abs(w)",
    "__lt__": "w < x",
    "__le__": "w <= x",
    "__gt__": "w > x",
    "__ge__": "w >= x",
    "__getitem__": "w[...]",
    "__iter__": "iteration",
    "__len__": "len(w)",
    "__float__": "float(w)",
    "__int__": "int(w)",
    "astype": "w.astype(...)",
    "reshape": "w.reshape(...)",
    "transpose": "w.transpose(...)",
    "sum": "w.sum(...)",
    "mean": "w.mean(...)",
    "dot": "w.dot(...)",
}


def add_refusals(cls: type) -> type:
    """Return a class whose operators and methods of arrays raise one sentence."""
    for name, example in _REFUSED.items():
        setattr(cls, name, _make_refusal(example))
    return cls
