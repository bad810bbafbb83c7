"""`Initializer`, the base class, and `InitialFactors`, their result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from jlora._types import AnyArray, Array, Float, PRNGKey, Scalar
from jlora.factors import SVD, Factors, split_svd
from jlora.reconstruction.dense import reconstruct

TRAINABLE = ("v", "u", "uv", "core", "s")
FROM_ZERO_V = ("v", "uv")  # v is zero, so u and a core would have no gradient


class InitialFactors(NamedTuple):
    """The first factors of a weight: w = base + scale * u @ v, or with a core between.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((4, 2)), jnp.zeros((2, 3)))
        >>> jlora.initializers.InitialFactors(None, factors).core is None
        True
    """

    base: Float[Array, "*batch m n"] | None  # None: the weight itself
    factors: Factors  # u [*batch, m, r] and v [*batch, r, n]
    core: Float[Array, ...] | None = None  # [*batch, r, r], or [*batch, r]: a diagonal

    @classmethod
    def from_residual(
        cls, w: Float[Array, "*batch m n"], factors: Factors, scale: Scalar
    ) -> InitialFactors:
        """Return the factors with the residual w - scale * u @ v as their base.

        It is computed in the compute dtype and rounded once to the dtype of w.
        """
        return cls(reconstruct(factors, w, scale=-scale), factors)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A function from a weight to its `InitialFactors`, with facts that a plan needs.

    Subclass it as a frozen dataclass: the fields are the settings of the method, and
    `__call__` computes the factors of one matrix, or of a batch. A plain function with
    the signature of `__call__` works as an initializer too and gets the defaults below.

    The attributes of the class say:
        name: the name in tables. Empty: the name of the class.
        trainable: which of "v", "u", "uv", "core" and "s" can be trained, the default
            first. The others would have a gradient of zero.
        data_meaning: the content of `data` for each weight, in words. None: no data.
        is_data_stored: whether `data` has the shape and the layout of the weight.
        is_data_required: whether a weight without data is refused.
        rank_multiple: ranks must be multiples of it.
        has_residual_base: whether the base is w - scale * u @ v, rounded once, or w
            itself where u @ v is zero. Jobs on files then need not store it.
        passes_nan_on: whether NaN in w reaches the factors. If not, `adapt` also looks
            at w itself, which costs one pass.
        has_relative_spectrum: whether a `RankBudget` compares energies as fractions of
            each weight's own energy.
        decomposition: of the weight. "randomized": it may stay sharded over devices.
            "full": by LAPACK or another method that needs the whole matrix on one
            device. "none": the weight is not read.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, jlora
        >>> from jlora.initializers import InitialFactors, Initializer
        >>> @dataclasses.dataclass(frozen=True)
        ... class Rows(Initializer):
        ...     def __call__(self, w, rank, *, scale, key, data=None):
        ...         u = jnp.eye(w.shape[-2], rank)
        ...         factors = jlora.Factors(u, w[..., :rank, :] / scale)
        ...         return InitialFactors.from_residual(w, factors, scale)
        >>> params = {"w": jnp.arange(12.0).reshape(4, 3)}
        >>> plan = jlora.make_plan(params, jlora.Rule("w", 2, init=Rows()))
        >>> jlora.adapt(params, plan, key=jax.random.key(0))["w"].v[1].tolist()
        [3.0, 4.0, 5.0]
    """

    name: ClassVar[str] = ""
    trainable: ClassVar[tuple[str, ...]] = TRAINABLE
    data_meaning: ClassVar[str | None] = None
    is_data_stored: ClassVar[bool] = False
    is_data_required: ClassVar[bool] = True
    rank_multiple: ClassVar[int] = 1
    has_residual_base: ClassVar[bool] = False
    passes_nan_on: ClassVar[bool] = False
    has_relative_spectrum: ClassVar[bool] = False
    decomposition: ClassVar[str] = "randomized"

    def __call__(
        self,
        w: Float[Array, "*batch m n"],
        rank: int,
        *,
        scale: Scalar,
        key: PRNGKey,
        data: Array | None = None,
    ) -> InitialFactors:
        """Return the first factors of w.

        Args:
            w: the weight as matrices [*batch, m, n], m inputs and n outputs.
            rank: static, the rank r of the factors.
            scale: of the delta, possibly traced and negative.
            key: one typed PRNG key, consumed.
            data: the entry of `adapt`'s `data` for this weight. None: none was given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    @property
    def keeps_residual(self) -> bool:
        """Whether the adapted weight has a base at all."""
        return True

    def data_shape(self, m: int, n: int) -> tuple[int | None, ...] | None:
        """Return the shape of `data` without batch axes; None stands for any."""
        del m, n
        return None

    def max_rank(self, m: int, n: int, data: AnyArray | None = None) -> int:
        """Return the largest rank for a matrix [m, n], given its data."""
        del data
        return min(m, n)

    def spectrum_matrix(
        self, w: Float[Array, "m n"], data: Array | None
    ) -> Float[Array, ...]:
        """Return the matrix whose singular values decide a rank chosen by rule."""
        del data
        return w

    @property
    def label(self) -> str:
        """The name in tables: the call, without arguments that have their defaults."""
        settings = [
            f"{field.name}={_describe(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        name = self.name or type(self).__name__
        return f"{name}({', '.join(settings)})" if settings else name


@dataclasses.dataclass(frozen=True)
class FunctionInitializer(Initializer):
    """A plain function as an initializer, with the defaults of the base class."""

    function: Callable[..., InitialFactors]

    data_meaning = "the input of the initializer"
    decomposition = "full"  # it may be any function of the whole matrix
    is_data_required = False

    def __call__(self, w, rank, *, scale, key, data=None) -> InitialFactors:
        return self.function(w, rank, scale=scale, key=key, data=data)

    @property
    def label(self) -> str:
        return _describe(self.function)


def split_scaled(svd: SVD, scale: Scalar) -> Factors:
    """Return balanced factors with scale * u @ v equal to the matrix of the SVD."""
    u, v = split_svd(svd._replace(s=svd.s / jnp.abs(scale)))
    return Factors(u * jnp.sign(scale).astype(u.dtype), v)


def _describe(value: object) -> str:
    """Return a setting as text, without the address that a function prints."""
    if isinstance(value, type) or not callable(value):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
