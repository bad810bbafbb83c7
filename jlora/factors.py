"""`SVD` and `Factors`: what passes between the rooms, and the way from one to the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jlora import _checks


class SVD(NamedTuple):
    """Truncated singular value decomposition, a ≈ (u * s) @ vt.

    Shapes: m, n rows and columns of the matrix, r the rank, ... batch axes.

    Example:
        >>> import jax, jlora
        >>> a = jax.random.normal(jax.random.key(0), (6, 4))
        >>> svd = jlora.truncated_svd(a, 2)
        >>> svd.u.shape, svd.s.shape, svd.vt.shape
        ((6, 2), (2,), (2, 4))
    """

    u: jax.Array  # [..., m, r], orthonormal columns
    s: jax.Array  # [..., r], descending, not negative
    vt: jax.Array  # [..., r, n], orthonormal rows


class Factors(NamedTuple):
    """Two thin factors that stand for the matrix u @ v.

    In the letters of LoRA, A = uᵀ and B = vᵀ.

    Shapes: m, n rows and columns of the matrix, r the rank, ... batch axes.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> jlora.reconstruct(factors).shape
        (6, 4)
    """

    u: jax.Array  # [..., m, r]
    v: jax.Array  # [..., r, n]


def split_svd(svd, absorb="both"):
    """Return the Factors of an SVD, the singular values put on one side or on both.

    u diag(s) vt = (u diag(s)^p) (diag(s)^(1-p) vt), with p = 1/2, 1 or 0.

    Shapes: m, n rows and columns, r rank.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].
        absorb: "both" (√s on each side), "left" (s on u) or "right" (s on v, which makes
            v[:, j] the coordinates of column j in the orthonormal basis u).

    Returns:
        `Factors` of u [..., m, r] and v [..., r, n], in the dtype of the SVD.

    Raises:
        TypeError: `svd` is not an SVD.
        ValueError: `absorb` is none of the three, or the shapes do not fit together.

    Gradients: those of the products. "balanced" has an infinite derivative at s = 0.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(jnp.diag(jnp.array([4.0, 1.0])), 1)
        >>> abs(jlora.split_svd(svd).v).round(3).tolist()
        [[2.0, 0.0]]
    """
    _checks.check_choice(absorb, ("both", "balanced", "left", "right"), "absorb")
    u, s, vt = check_svd(svd)
    if absorb == "left":
        return Factors(u * s[..., None, :], vt)
    if absorb == "right":
        return Factors(u, s[..., :, None] * vt)
    root = jnp.sqrt(s)
    return Factors(u * root[..., None, :], root[..., :, None] * vt)


def fix_signs(svd):
    """Return the SVD with the sign of each triplet chosen by a rule: the same one each time.

    The entry of largest magnitude in each column of u is made positive, the first of them where
    several are as large. u diag(s) vt stays what it is.

    Shapes: m, n rows and columns, r rank.

    Args:
        svd: `SVD` of u [..., m, r], s [..., r], vt [..., r, n].

    Returns:
        `SVD` of the same shapes and dtypes.

    Raises:
        TypeError: `svd` is not an SVD.
        ValueError: shapes that do not fit together.

    Gradients: those of u and vt, turned with them.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> svd = jlora.truncated_svd(-jnp.diag(jnp.array([4.0, 1.0])), 2)
        >>> jlora.factors.fix_signs(svd).u.round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    u, s, vt = check_svd(svd)
    largest = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
    negative = jnp.take_along_axis(u, largest, axis=-2) < 0  # [..., 1, r]
    return SVD(jnp.where(negative, -u, u), s, jnp.where(negative.mT, -vt, vt))


def pad_rank(factors, rank):
    """Return factors of the same product with zeros up to `rank`."""
    u, v = factors
    no_padding, missing = [(0, 0)] * (u.ndim - 2), rank - u.shape[-1]
    return Factors(
        jnp.pad(u, [*no_padding, (0, 0), (0, missing)]),
        jnp.pad(v, [*no_padding, (0, missing), (0, 0)]),
    )


def check_svd(svd, name="svd"):
    """Return the three arrays of `svd` after checking that they belong together."""
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


def mask_nonfinite(svd, finite):
    """Return the SVD with NaN for each matrix that is not `finite` [..., 1, 1]."""
    nan = jnp.asarray(jnp.nan, svd.s.dtype)
    return SVD(
        jnp.where(finite, svd.u, nan),
        jnp.where(finite[..., 0], svd.s, nan),
        jnp.where(finite, svd.vt, nan),
    )
