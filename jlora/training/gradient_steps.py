"""Gradients of factors, as pure functions: preconditioned, kept off a subspace, transported."""

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import eye_like, matmul, to_compute
from jlora.factors import Factors


def precondition_gradient(factors, gradient, *, delta=1e-6):
    """Return the gradient of the factors, each preconditioned by the other's Gram matrix.

    du (v vᵀ + δ I)⁻¹ and (uᵀu + δ I)⁻¹ dv: the gradient in a metric in which the step on the
    product does not depend on how it is split, u → u G, v → G⁻¹ v. Plain gradient descent is
    slowed by the condition of the factors; this one is not.

    Shapes: m, n rows and columns of u @ v, r rank.

    Args:
        factors: `Factors` of u [..., m, r], v [..., r, n].
        gradient: `Factors` of the same shapes, of a loss to u and v.
        delta: not negative, static or traced: δ is delta times the mean of the diagonal of
            the Gram matrix. It keeps the step finite where a factor is not of full rank, as at
            the start of LoRA, where one factor is zero; 0 makes the invariance exact.

    Returns:
        `Factors` in the common compute dtype: what to subtract, times a learning rate. Of a
        factor that is zero the other's gradient comes back as it is.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: O((m + n) r² + r³) flops.

    Source: Zhang and Pilanci, "Riemannian preconditioned LoRA for fine-tuning foundation
        models", 2024; Tong, Ma, Chi, "Accelerating ill-conditioned low-rank matrix estimation
        via scaled gradient descent", 2021. Differs: δ is relative.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> factors = jlora.Factors(jnp.full((3, 1), 2.0), jnp.full((1, 4), 0.5))
        >>> step = jlora.training.precondition_gradient(factors, factors, delta=0.0)
        >>> round(float(step.u[0, 0]), 4), round(float(step.v[0, 0]), 4)
        (2.0, 0.0417)
    """
    u, v = _checks.check_factors(factors)
    du, dv = _checks.check_factors(gradient, "gradient")
    _checks.check_shape(du.shape, u.shape, "gradient.u", "that of factors.u")
    _checks.check_shape(dv.shape, v.shape, "gradient.v", "that of factors.v")
    return _precondition_gradient(u, v, du, dv, delta)


@jax.jit
def _precondition_gradient(u, v, du, dv, delta):
    u, v, du, dv = to_compute(u, v, du, dv)
    gram_u, gram_v = matmul(u.mT, u), matmul(v, v.mT)
    return Factors(
        _solve_damped(gram_v, du.mT, delta).mT, _solve_damped(gram_u, dv, delta)
    )


def _solve_damped(gram, rows, delta):
    """Return (gram + δ I)⁻¹ rows."""
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
    # A Gram matrix of zeros has no inverse; nothing is preconditioned then.
    is_zero = mean == 0
    eye = eye_like(gram)
    damped = jnp.where(is_zero, eye, gram + jnp.asarray(delta, gram.dtype) * mean * eye)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), rows)


def project_gradient_out(gradient, basis, *, side="left"):
    """Return a gradient without its part in a protected subspace.

    g − b bᵀg (left) or g − g b bᵀ (right): a step along it leaves what the weights do to vectors
    of the subspace as it is, so that a new domain does not overwrite an old one.

    Shapes: m, n rows and columns, p the dimension of the subspace.

    Args:
        gradient: [..., m, n] real floating, of a weight or of a factor.
        basis: [..., m, p] (left) or [..., n, p] (right), orthonormal columns, such as the leading
            right singular vectors of the old domain's activations (inputs x [t, m] of y = x w).
        side: static, "left" (inputs of x @ w are protected) or "right" (outputs).

    Returns:
        [..., m, n] in the dtype of the gradient.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit, or another side.

    Cost: 4 m n p flops.

    Source: Saha, Garg, Roy, "Gradient projection memory for continual learning", 2021.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> basis = jnp.array([[1.0], [0.0]])
        >>> jlora.training.project_gradient_out(jnp.ones((2, 2)), basis).tolist()
        [[0.0, 0.0], [1.0, 1.0]]
    """
    _checks.check_choice(side, ("left", "right"), "side")
    gradient = _checks.check_matrix(gradient, "gradient")
    basis = _checks.check_matrix(basis, "basis")
    size = gradient.shape[-2 if side == "left" else -1]
    expected = (*gradient.shape[:-2], size, basis.shape[-1])
    _checks.check_shape(
        basis.shape, expected, "basis", f"a row for each of the {side} side"
    )
    g, b = to_compute(gradient, basis)
    inside = (
        matmul(b, matmul(b.mT, g)) if side == "left" else matmul(matmul(g, b), b.mT)
    )
    return (g - inside).astype(gradient.dtype)


def transport_moments(first, second, old_basis, new_basis):
    """Return Adam's moments of a projected gradient, carried over to another subspace.

    A gradient g is kept as bᵀg; when the basis b changes to b', the first moment becomes b'ᵀb m.
    The second, a mean of squares, becomes (b'ᵀb)∘² (v − m∘²) + (b'ᵀb m)∘²: the variances of
    coordinates taken to be uncorrelated, and the square of the mean that is carried over.

    Shapes: m rows of the gradient, n its columns, p and q dimensions of the two subspaces.

    Args:
        first, second: [..., p, n] real floating, the moments, free of Adam's bias correction.
        old_basis: [..., m, p], orthonormal columns.
        new_basis: [..., m, q], orthonormal columns.

    Returns:
        (first, second), [..., q, n] each in its dtype; second is not negative.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: shapes that do not fit.

    Cost: 2 m p q + 4 p q n flops.

    Source: Robert et al., "LDAdam: adaptive optimization from low-dimensional gradient
        statistics", 2024, section 3.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
        >>> moment = jnp.array([[1.0], [2.0]])
        >>> first, second = jlora.training.transport_moments(moment, moment**2, jnp.eye(2), swap)
        >>> first.tolist(), second.tolist()
        ([[2.0], [1.0]], [[4.0], [1.0]])
    """
    first, second = (
        _checks.check_matrix(moment, name)
        for name, moment in (("first", first), ("second", second))
    )
    old = _checks.check_matrix(old_basis, "old_basis")
    new = _checks.check_matrix(new_basis, "new_basis")
    batch, (m, p) = old.shape[:-2], old.shape[-2:]
    _checks.check_shape(
        new.shape, (*batch, m, new.shape[-1]), "new_basis", "rows of old_basis"
    )
    _checks.check_shape(
        first.shape,
        (*batch, p, first.shape[-1]),
        "first",
        "a row for each column of old_basis",
    )
    _checks.check_shape(second.shape, first.shape, "second", "that of first")
    mean, square, old, new = to_compute(first, second, old, new)
    turn = matmul(new.mT, old)
    carried = matmul(turn, mean)
    variance = jnp.maximum(square - mean**2, 0)
    carried_square = matmul(turn**2, variance) + carried**2
    return carried.astype(first.dtype), carried_square.astype(second.dtype)
