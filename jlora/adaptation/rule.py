"""`Rule`: how the weights of a tree whose path matches a pattern are adapted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

from jlora import _checks
from jlora.adaptation.placements import PARALLEL
from jlora.adaptation.rank_rules import RankBudget, RankRule
from jlora.initializers.base import TRAINABLE, Initializer
from jlora.initializers.lookup import as_initializer
from jlora.initializers.quantized import QuantizedInitializer
from jlora.quantization.base import Format
from jlora.quantization.formats import as_format
from jlora.quantization.quantized_array import RoundTrip


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights whose path matches `pattern` are adapted.

    A weight becomes base + scale * u @ v, of its view as a matrix [..., m, n] with m
    inputs and n outputs. If "core" is trained it is base + scale * u @ core @ v, and if
    "s" is trained base + scale * u @ diag(s) @ v.

    Args:
        pattern: regular expression, searched anywhere in the path
            ("layers/0/attention/q"). "layers/1" also matches layer 10; "layers/1/" does
            not.
        rank: static, ≥ 1; or a `RankRule` or `RankBudget`, from which `make_plan`
            chooses it.
        scale: of the delta; finite, not zero. None: 1, or alpha / rank with `alpha`.
        alpha: the scale is alpha / rank. None: see `scale`.
        rank_stabilized: with `alpha`, the scale is alpha / √rank (rsLoRA).
        init: the initializer: one of `jlora.initializers`, your own `Initializer` or
            function, or the name of one of jlora's, short for the call without
            arguments.
        trainable: "v", "u", "uv", "core" (an r×r matrix between u and v) or "s" (a
            diagonal one). None: the default of the initializer, usually "v".
        num_columns: static k: only the last k columns of v are trained. Needs
            trainable="v". None: all of them.
        layout: a letter for each of the last axes of the stored array: "i" an input,
            "o" an output, "b" a batch axis; axes before these are batch axes. "io": a
            kernel of JAX, a table of embeddings [vocabulary, size]; "oi": a weight of
            torch; "ioo", "iio": kernels [inputs, heads, size], [heads, size, outputs]
            of attention; "iiio": a kernel [height, width, inputs, outputs] of a
            convolution, "oiii" one of torch.
        exclude: regular expression; paths that contain it do not match. None: none.
        quantize: static, the format in which the base is stored: one of
            `jlora.quantization`, or its name, for any initializer. "lora" then is
            QLoRA, and "pissa" quantises the residual. For "loftq", "qpissa" and "qera"
            it may also be a function quantize(w) -> the nearest weight that the base
            can hold, from and to [m, n]; their base then is a plain array. None: plain
            bases; `quantize_nf4` for these three.
        parallel: static, how weights on a mesh are decomposed. "layers": each device
            has whole matrices of its own. "exchange": the same for matrices that are
            sharded; they are made whole for it, and sharded again. "matrix": each
            matrix stays sharded, and all devices work on it. None: chosen by cost, see
            `make_plan`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value outside those above, or a trainable whose gradient would
            always be zero.

    Example:
        >>> import jlora
        >>> jlora.Rule("attention/(q|v)$", 8, init=jlora.initializers.olora()).trainable
        'v'
    """

    pattern: str
    rank: int | RankRule | RankBudget
    _: dataclasses.KW_ONLY
    scale: float | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    init: str | Initializer | Callable = "pissa"
    trainable: str | None = None
    num_columns: int | None = None
    layout: str = "io"
    exclude: str | None = None
    quantize: Format | str | Callable | None = None
    parallel: str | None = None

    def __post_init__(self) -> None:
        _compile_pattern(self.pattern, "pattern")
        if self.exclude is not None:
            _compile_pattern(self.exclude, "exclude")
        if not isinstance(self.rank, (RankRule, RankBudget)):
            self._set("rank", _checks.check_integer(self.rank, "rank"))
        _check_layout(self.layout)
        if self.parallel is not None:
            _checks.check_choice(self.parallel, PARALLEL, "parallel")

        self._resolve_scale()
        self._resolve_initializer()
        self._resolve_trainable()

    @property
    def initializer(self) -> Initializer:
        """The initializer, typed: `init` after its name or function was looked up."""
        assert isinstance(self.init, Initializer)
        return self.init

    @property
    def format(self) -> Format | None:
        """The format in which the base is stored, None for a plain array."""
        return self.quantize if isinstance(self.quantize, Format) else None

    @property
    def has_rank(self) -> bool:
        """Whether the rank is a number already."""
        return isinstance(self.rank, int)

    def matches(self, path: str) -> bool:
        """Return whether the rule applies to the weight at `path`."""
        if self.exclude is not None and re.search(self.exclude, path):
            return False
        return re.search(self.pattern, path) is not None

    def with_rank(self, rank: int) -> Rule:
        """Return the rule with this rank, and the scale that follows from it."""
        scale = None if self.alpha else self.scale
        return dataclasses.replace(self, rank=rank, scale=scale)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_scale(self) -> None:
        if self.alpha is None:
            if self.rank_stabilized:
                raise ValueError(
                    "`alpha` must be given with rank_stabilized=True, got None. "
                    "Pass it, or a scale."
                )
            self._set("scale", 1.0 if self.scale is None else self.scale)
            _check_number(self.scale, "scale")
            return

        _check_number(self.alpha, "alpha")
        scale = self._divide_alpha(self.alpha)
        if self.scale not in (None, scale):
            raise ValueError(
                f"`scale` must be left out where `alpha` is given, got {self.scale}. "
                "Choose one of them."
            )
        self._set("scale", scale)

    def _divide_alpha(self, alpha: float) -> float | None:
        """Return the scale, or None as long as the rank is not chosen."""
        if not isinstance(self.rank, int):
            return None
        return alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def _resolve_initializer(self) -> None:
        init = as_initializer(self.init)
        if isinstance(self.quantize, str):
            self._set("quantize", as_format(self.quantize, "quantize"))
        if isinstance(init, QuantizedInitializer):
            if self.quantize is None:
                self._set("quantize", init.quantize)
            _check_quantize(self.quantize)
            quantize = self.quantize
            if isinstance(quantize, Format):
                quantize = RoundTrip(quantize)
            init = dataclasses.replace(init, quantize=quantize)
        elif self.quantize is not None:
            _check_format(self.quantize, init)
        self._set("init", init)

        multiple = init.rank_multiple
        if isinstance(self.rank, int) and self.rank % multiple:
            raise ValueError(
                f"`rank` must be a multiple of {multiple} for init={init.label!r}, got "
                f"{self.rank}. Change it, or choose ranks with multiple_of={multiple}."
            )

    def _resolve_trainable(self) -> None:
        init = self.initializer
        if self.trainable is None:
            self._set("trainable", init.trainable[0])
        _checks.check_choice(self.trainable, TRAINABLE, "trainable")
        if self.trainable not in init.trainable:
            name = f"trainable (with init={init.label!r})"
            _checks.check_choice(self.trainable, init.trainable, name)

        if self.num_columns is not None:
            _checks.check_integer(self.num_columns, "num_columns")
            _checks.check_choice(self.trainable, ("v",), "trainable (with num_columns)")


def _compile_pattern(pattern: str, name: str) -> None:
    if not isinstance(pattern, str):
        raise TypeError(
            f"`{name}` must be a string, got {type(pattern).__name__}. "
            "Write a regular expression on the path."
        )

    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{name}` must be a regular expression, got {pattern!r} ({error}). Escape "
            "it."
        ) from None


def _check_number(value: float | None, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{name}` must be a Python number, got {type(value).__name__}. "
            "Convert it with float()."
        )
    if not math.isfinite(value) or value == 0:
        raise ValueError(
            f"`{name}` must be finite and not zero, got {value}. Choose another."
        )


def _check_quantize(quantize: object) -> None:
    if not (callable(quantize) or isinstance(quantize, Format)):
        raise TypeError(
            "`quantize` must be a format or a function of a weight, got "
            f"{type(quantize).__name__}. Pass for example jlora.quantization.int8()."
        )


def _check_format(quantize: object, init: Initializer) -> None:
    if not isinstance(quantize, Format):
        raise ValueError(
            f"`quantize` must be a format with init={init.label!r}, got "
            f"{type(quantize).__name__}. Pass for example jlora.quantization.nf4(), or "
            "'loftq' for a function."
        )
    if not init.keeps_residual:
        raise ValueError(
            f"`quantize` must be None with init={init.label!r}, which keeps no base, "
            f"got {quantize.label}. Leave it out."
        )


def _check_layout(layout: str) -> None:
    if not isinstance(layout, str):
        raise TypeError(
            f"`layout` must be a string, got {type(layout).__name__}. "
            "Write for example 'io'."
        )
    if not (set(layout) <= set("bio") and "i" in layout and "o" in layout):
        raise ValueError(
            "`layout` must name each axis 'b', 'i' or 'o', with an input and an "
            f"output, got {layout!r}. Write 'io' for [inputs, outputs], 'oi' for "
            "[outputs, inputs]."
        )
