"""`Format`, the base class of the formats, and `Encoded`, their result."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

from jlora._types import Array, Float


class Encoded(NamedTuple):
    """Codes and scales of rows; a scale belongs to a block of inputs of one output."""

    codes: Array  # [*batch, n, bytes]
    scales: Any  # [*batch, n, k], or `NestedScales`
    zeros: Array | None = None  # [*batch, n, k], codes of the number zero


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of few bits; `nf4`, `int8`, `int4` and `fp8` make one.

    Example:
        >>> import jlora
        >>> jlora.quantization.int8(block_size=128).label
        'int8(block_size=128)'
    """

    block_size: int | None = None  # inputs that share a scale; None: all of an output

    name: ClassVar[str] = ""
    codes_per_byte: ClassVar[int] = 1  # neighbouring inputs whose codes share a byte

    def encode(self, w: Float[Array, ...], axis: int) -> Encoded:
        """Return the codes of float32 weights.

        Args:
            w: [*batch, n, m] or, as a kernel of JAX, [*batch, m, n].
            axis: static, of the inputs m: -1 or -2. The codes have the inputs last.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode.")

    def decode(self, encoded: Encoded, num_inputs: int) -> Float[Array, "*batch n m"]:
        """Return the float32 rows of codes, whose scales are not nested."""
        raise NotImplementedError(f"{type(self).__name__} must define decode.")

    def find_block_size(self, num_inputs: int) -> int:
        """Return the number of inputs in a block of a row of so many."""
        return max(num_inputs, 1) if self.block_size is None else self.block_size

    @property
    def label(self) -> str:
        """The call that makes the format, without arguments that have their defaults.

        It is the name of the format in tables.
        """
        settings = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(settings)})" if settings else self.name
