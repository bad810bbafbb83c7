"""`SVD` and `Factors`, the values that packages exchange, and their conversions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jlora import _checks
from jlora._sharding import follow_axes
from jlora._types import Array, Bool, Float, Int

__all__ = ["SVD", "Factors", "fix_signs", "split_svd"]


class SVD(NamedTuple):
    """Truncated singular value decomposition, a ≈ (u * s) @ vt.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (6, 4))
        >>> svd = jlora.truncated_svd(a, 2)
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((6, 2), (2,), (2, 4))
    """

    u: Float[Array, "*batch m r"]  # orthonormal columns
    s: Float[Array, "*batch r"]  # descending, not negative
    vt: Float[Array, "*batch r n"]  # orthonormal rows


class Factors(NamedTuple):
    """Two thin factors that stand for the matrix u @ v.

    In the letters of LoRA, A = uᵀ and B = vᵀ.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> jlora.reconstruct(factors).shape
        (6, 4)
    """

    u: Float[Array, "*batch m r"]
    v: Float[Array, "*batch r n"]


# The axes of both as arguments and results of `follow_axes`. "_" is never sharded.
SVD_AXES = ("*b m r", "*b r", "*b r n")
NEW_SVD_AXES: Any = SVD("*b m _", "*b _", "*b _ n")  # type: ignore[arg-type]
NEW_FACTORS_AXES: Any = Factors("*b m _", "*b _ n")  # type: ignore[arg-type]


def split_svd(
    svd: SVD, absorb: Literal["both", "balanced", "left", "right"] = "both"
) -> Factors:
    """Return the factors of an SVD, with the singular values in one of them or in both.

    u diag(s) vt = (u diag(s)^p) (diag(s)^(1-p) vt), with p = 1/2, 1 or 0.

    Args:
        svd: the SVD of a matrix, or of a batch.
        absorb: the factor that takes the singular values. "both": √s on each side.
            "left": s on u. "right": s on v, which makes v[:, j] the coordinates of
            column j in the orthonormal basis u. "balanced" is another name of "both".

    Returns:
        `Factors` in the dtype of the SVD.

    Raises:
        TypeError: `svd` is not an SVD.
        ValueError: `absorb` is unknown, or the shapes do not fit together.

    Gradients: of the products. "both" has an infinite derivative at s = 0.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([4.0, 1.0])), 1)
        >>> abs(jlora.split_svd(svd).v).round(3).tolist()
        [[2.0, 0.0]]
    """
    if absorb != "balanced":
        _checks.check_choice(absorb, ("both", "left", "right"), "absorb")
    u, s, vt = check_svd(svd)

    if absorb == "left":
        return Factors(u * s[..., None, :], vt)
    if absorb == "right":
        return Factors(u, s[..., :, None] * vt)
    root = jnp.sqrt(s)
    return Factors(u * root[..., None, :], root[..., :, None] * vt)


def fix_signs(svd: SVD) -> SVD:
    """Return the SVD with a unique sign for each triplet.

    The entry of largest magnitude in each column of u becomes positive (the first one,
    if several are equally large). The product u diag(s) vt does not change.

    Args:
        svd: the SVD of a matrix, or of a batch.

    Returns:
        `SVD` of the same shapes and dtypes.

    Raises:
        TypeError: `svd` is not an SVD.
        ValueError: the shapes do not fit together.

    Gradients: of u and vt, with the same signs.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(-jnp.diag(jnp.array([4.0, 1.0])), 2)
        >>> jlora.factors.fix_signs(svd).u.round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _fix_signs(SVD(*check_svd(svd)))


@follow_axes(SVD_AXES, result=NEW_SVD_AXES)
def _fix_signs(svd: SVD) -> SVD:
    u, s, vt = svd
    largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
    is_negative = jnp.take_along_axis(u, largest, axis=-2) < 0  # [*batch, 1, r]
    return SVD(jnp.where(is_negative, -u, u), s, jnp.where(is_negative.mT, -vt, vt))


def check_svd(
    svd: SVD, name: str = "svd"
) -> tuple[
    Float[Array, "*batch m r"], Float[Array, "*batch r"], Float[Array, "*batch r n"]
]:
    """Return the three arrays of `svd` after a check that their shapes fit together."""
    if not (isinstance(svd, tuple) and len(svd) == 3):
        raise TypeError(
            f"`{name}` must be a triple SVD(u, s, vt), got {type(svd).__name__}. "
            "Make one with jlora.randomized_svd or jlora.truncated_svd."
        )
    u = _checks.check_matrix(svd[0], f"{name}.u")
    s = _checks.check_array(svd[1], f"{name}.s")
    vt = _checks.check_matrix(svd[2], f"{name}.vt")

    fits = u.shape[:-2] + u.shape[-1:] == s.shape == vt.shape[:-1]
    if not fits:
        raise ValueError(
            f"`{name}` must have u [..., m, r], s [..., r] and vt [..., r, n], "
            f"got {u.shape}, {s.shape} and {vt.shape}. Check that they belong together."
        )
    return u, s, vt


def pad_rank(factors: Factors, rank: int) -> Factors:
    """Return factors of rank `rank` with the same product: the new entries are zero."""
    u, v = factors
    no_padding = [(0, 0)] * (u.ndim - 2)
    missing = rank - u.shape[-1]
    return Factors(
        jnp.pad(u, [*no_padding, (0, 0), (0, missing)]),
        jnp.pad(v, [*no_padding, (0, missing), (0, 0)]),
    )


def truncate_svd(svd: SVD, rank: int) -> SVD:
    """Return the leading `rank` triplets."""
    return SVD(svd.u[..., :rank], svd.s[..., :rank], svd.vt[..., :rank, :])


def mask_rank(svd: SVD, rank: Int[Array, "*batch"]) -> SVD:
    """Return the SVD with zeros beyond the first `rank` triplets of each matrix.

    The shapes stay, so the rank may be traced and differ within a batch.
    """
    shape = (*rank.shape, svd.s.shape[-1])
    index = jnp.broadcast_to(jnp.arange(shape[-1], dtype=rank.dtype), shape)
    is_kept = index < rank[..., None]
    return SVD(
        jnp.where(is_kept[..., None, :], svd.u, 0),
        jnp.where(is_kept, svd.s, 0),
        jnp.where(is_kept[..., :, None], svd.vt, 0),
    )


def mask_nonfinite(svd: SVD, finite: Bool[Array, "*batch 1 1"]) -> SVD:
    """Return the SVD with NaN for each matrix that is not `finite`."""
    nan = jnp.asarray(jnp.nan, svd.s.dtype)
    return SVD(
        jnp.where(finite, svd.u, nan),
        jnp.where(finite[..., 0], svd.s, nan),
        jnp.where(finite, svd.vt, nan),
    )
