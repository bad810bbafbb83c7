"""`Rule`: how the weights of a tree whose path matches a pattern are adapted."""

import dataclasses
import math
import re
from collections.abc import Callable

from jlora import _checks
from jlora.adaptation.rank_choice import RankBudget, RankRule
from jlora.initializers.from_weight import INITIALIZATIONS, PARTS
from jlora.quantization.round_trips import quantize_nf4

_QUANTIZED = ("loftq", "qpissa")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights whose path matches `pattern` are adapted.

    A weight is w = base + scale * u @ v, or base + scale * u @ core @ v, or base + scale *
    u @ diag(s) @ v, of its view as a matrix [..., m, n] with m inputs and n outputs.

    Args:
        pattern: regular expression, searched for anywhere in the path ("layers/0/attention/q").
        rank: static, ≥ 1; or `RankRule` or `RankBudget`, with which `make_plan` chooses it.
        scale: of the delta; finite, not zero. None: 1, or what `alpha` makes it.
        alpha: the scale is alpha / rank. None: see `scale`.
        rank_stabilized: with `alpha`, the scale is alpha / √rank (rsLoRA).
        init: see the table below.
        trainable: what is trained: "v", "u", "uv", "core" (an r×r matrix between u and v) or "s" (a
            diagonal one). None: "core" for lora_xs, "s" for svf, else "v".
        num_columns: static k: of v, only the last k columns are trained. Needs part "v".
            None: all of them.
        layout: a letter for each of the last axes of the array as it is stored: "i" an input,
            "o" an output, "b" a batch axis; axes before these are batch axes. "io": a kernel of
            JAX, a table of embeddings [vocabulary, size]; "oi": a weight of torch; "ioo", "iio":
            kernels [inputs, heads, size], [heads, size, outputs] of attention; "iiio": a kernel
            [height, width, inputs, outputs] of a convolution, "oiii" one of torch.
        exclude: regular expression; paths in which it is found do not match. None: none.
        residual: keep what the factors leave out in the base, so that the weight is unchanged
            (True), or drop it, w ≈ u v, as a compression (False), which needs "pissa".
        quantize: for "loftq" and "qpissa", quantize(w) -> the nearest weight that the quantised
            base can hold, static, of and to [m, n]. None: `quantize_nf4` for these.
        num_rounds: for the same, how often base and factors are fitted to each other, ≥ 1.

    The initialisations, and what each starts from:

        "pissa"        the leading singular triplets of w
        "milora"       the last ones
        "olora"        a QR decomposition of w
        "svf"          the leading triplets, their values apart to be trained
        "lora_xs"      the leading triplets, fixed, around a core of zeros
        "lora"         u random, v zero
        "orthogonal"   both random, their product zero; an even rank
        "loftq"        what quantising w leaves out, and quantising again what that leaves out
        "qpissa"       the leading triplets, and quantising what they leave out
        "corda"        the leading triplets of w weighted with the inputs' second moments `data`
                       [..., m, m], any multiple of xᵀx
        "eva"          u the leading directions of activations `data` [..., t, m], v zero
        "lora_ga"      the leading directions of a gradient `data` of the shape of w
        "difference"   the leading triplets of a fine-tuned weight `data` minus w: w moves there

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value outside those above, or a part whose gradient would be zero for ever.

    Example:
        >>> import jlora
        >>> jlora.Rule("attention/(q|v)$", 8).trainable
        'v'
    """

    pattern: str
    rank: int | RankRule | RankBudget
    _: dataclasses.KW_ONLY
    scale: float | None = None
    alpha: float | None = None
    rank_stabilized: bool = False
    init: str = "pissa"
    trainable: str | None = None
    num_columns: int | None = None
    layout: str = "io"
    exclude: str | None = None
    residual: bool = True
    quantize: Callable | None = None
    num_rounds: int = 1

    def __post_init__(self):
        _compile_pattern(self.pattern, "pattern")
        if self.exclude is not None:
            _compile_pattern(self.exclude, "exclude")
        if not isinstance(self.rank, (RankRule, RankBudget)):
            object.__setattr__(self, "rank", _checks.check_integer(self.rank, "rank"))
        _check_layout(self.layout)
        self._settle_scale()
        self._settle_part()
        self._check_initialization()

    @property
    def has_rank(self):
        """Whether the rank is a number already."""
        return isinstance(self.rank, int)

    def matches(self, path):
        """Say whether the rule is about the weight at `path`."""
        if self.exclude is not None and re.search(self.exclude, path):
            return False
        return re.search(self.pattern, path) is not None

    def with_rank(self, rank):
        """Return the rule with this rank, and the scale that it gives."""
        return dataclasses.replace(
            self, rank=rank, scale=None if self.alpha else self.scale
        )

    def _settle_scale(self):
        if self.alpha is None:
            if self.rank_stabilized:
                raise ValueError(
                    "`alpha` must be given with rank_stabilized=True, got None. "
                    "Pass it, or a scale."
                )
            scale = 1.0 if self.scale is None else self.scale
            _check_number(scale, "scale")
        else:
            _check_number(self.alpha, "alpha")
            scale = self._divide_alpha() if self.has_rank else None
            if self.scale not in (None, scale):
                raise ValueError(
                    f"`scale` must be left out where `alpha` is given, got {self.scale}. "
                    "Choose one of them."
                )
        object.__setattr__(self, "scale", scale)

    def _divide_alpha(self):
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def _settle_part(self):
        _checks.check_choice(self.init, tuple(INITIALIZATIONS), "init")
        parts = INITIALIZATIONS[self.init].parts
        if self.trainable is None:
            object.__setattr__(self, "trainable", parts[0])
        _checks.check_choice(self.trainable, PARTS, "trainable")
        if self.trainable not in parts:
            _checks.check_choice(
                self.trainable, parts, f"trainable (with init={self.init!r})"
            )
        if self.num_columns is not None:
            _checks.check_integer(self.num_columns, "num_columns")
            _checks.check_choice(self.trainable, ("v",), "trainable (with num_columns)")

    def _check_initialization(self):
        if self.init == "orthogonal" and self.has_rank and self.rank % 2:
            raise ValueError(
                f"`rank` must be even for init='orthogonal', got {self.rank}. Add one, "
                "or choose ranks with multiple_of=2."
            )
        if not self.residual:
            _checks.check_choice(self.init, ("pissa",), "init (with residual=False)")
        if self.init in _QUANTIZED and self.quantize is None:
            object.__setattr__(self, "quantize", quantize_nf4)
        if (self.init in _QUANTIZED) != callable(self.quantize):
            raise ValueError(
                f"`quantize` must be a function for init 'loftq' or 'qpissa' and None for others, "
                f"got {self.quantize!r} for {self.init!r}. Pass for example jlora.quantization.quantize_int8."
            )
        _checks.check_integer(self.num_rounds, "num_rounds")
        if self.num_rounds != 1 and self.init not in _QUANTIZED:
            raise ValueError(
                f"`num_rounds` must be 1 but for init 'loftq' or 'qpissa', got {self.num_rounds} "
                f"for {self.init!r}. Leave it out."
            )


def _compile_pattern(pattern, name):
    if not isinstance(pattern, str):
        raise TypeError(
            f"`{name}` must be a string, got {type(pattern).__name__}. "
            "Write a regular expression on the path."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"`{name}` must be a regular expression, got {pattern!r} ({error}). Escape it."
        ) from None


def _check_number(value, name):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"`{name}` must be a Python number, got {type(value).__name__}. "
            "Convert it with float()."
        )
    if not math.isfinite(value) or value == 0:
        raise ValueError(
            f"`{name}` must be finite and not zero, got {value}. Choose another."
        )


def _check_layout(layout):
    if not isinstance(layout, str):
        raise TypeError(
            f"`layout` must be a string, got {type(layout).__name__}. Write for example 'io'."
        )
    if not (set(layout) <= set("bio") and "i" in layout and "o" in layout):
        raise ValueError(
            f"`layout` must name each axis 'b', 'i' or 'o', with an input and an output, got "
            f"{layout!r}. Write 'io' for [inputs, outputs], 'oi' for [outputs, inputs]."
        )
