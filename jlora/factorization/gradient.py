"""The best low-rank approximation as a differentiable function of the matrix."""

import functools

import jax
import jax.numpy as jnp

from jlora import _checks
from jlora._numerics import matmul, safe_divide, to_compute
from jlora.factorization.svd import randomized_svd

# Conjugate gradients stop at a relative residual near rounding, or after so many steps: enough
# for a gap σ_k / σ_k₊₁ of 1.01; closer ones leave the derivative ill-conditioned in any case.
_MOST_STEPS = 200


def low_rank_approximation(a, rank, *, key):
    """Return the best approximation of each matrix by one of rank `rank`, differentiably.

    a ↦ a_k = u diag(s) vt is the gradient of ½ Σᵢ≤ₖ σᵢ², so its Jacobian is self-adjoint, and it
    is smooth wherever σ_k > σ_k₊₁: singular vectors may turn inside the leading space, what they
    span may not. With P the projections on the complements,

        D a_k[da] = u (uᵀ da v) vᵀ + X diag(s) vᵀ + u diag(s) Yᵀ,
        (σⱼ² − a_⊥ a_⊥ᵀ) xⱼ = σⱼ P_u da vⱼ + a_⊥ P_v daᵀ uⱼ,   yⱼ = (P_v daᵀ uⱼ + a_⊥ᵀ xⱼ) / σⱼ.

    Shapes: m, n rows and columns, r = rank, ... batch axes.

    Args:
        a: [..., m, n] real floating.
        rank: static, 1 ≤ rank ≤ min(m, n).
        key: one typed PRNG key, consumed by the decomposition.

    Returns:
        [..., m, n] in the compute dtype.

    Raises:
        TypeError: `a` is no real floating array, `rank` no static integer, `key` no typed key.
        ValueError: `rank` is out of range.

    Cost: that of `randomized_svd`; its derivative, two thin products with `a` for each step of
        conjugate gradients, of which a gap of σ_k / σ_k₊₁ = 1.1 takes about ten.

    Accuracy: as `randomized_svd` at its default setting.

    Gradients: exact, forward and reverse, also at singular values repeated inside the leading
        `rank`. Where σ_k = σ_k₊₁ the map has no derivative; what comes back there is finite and
        of no use. Of order one only: the derivative of the derivative is refused by JAX or wrong.

    Source: the Sylvester equation of the truncated decomposition, as in Wan and Zhang,
        "Automatic differentiation for complex valued SVD", 2019, solved in the form above.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> a = jnp.diag(jnp.array([3.0, 3.0, 1.0]))  # repeated singular values
        >>> key = jax.random.key(0)
        >>> energy = lambda a: 0.5 * jnp.sum(jlora.low_rank_approximation(a, 2, key=key) ** 2)
        >>> bool(abs(jax.grad(energy)(a) - jnp.diag(jnp.array([3.0, 3.0, 0.0]))).max() < 1e-5)
        True
    """
    a = _checks.check_matrix(a)
    rank = _checks.check_rank(rank, a.shape)
    _checks.check_key(key)
    return _approximate(to_compute(a), key, rank)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _approximate(a, key, rank):
    return _multiply_out(randomized_svd(a, rank, key=key))


@_approximate.defjvp
def _differentiate_approximation(rank, primals, tangents):
    a, key = primals
    svd = randomized_svd(jax.lax.stop_gradient(a), rank, key=key)
    return _multiply_out(svd), _differentiate(
        jax.lax.stop_gradient(a), svd, tangents[0]
    )


def _multiply_out(svd):
    return matmul(svd.u * svd.s[..., None, :], svd.vt)


def _differentiate(a, svd, tangent):
    u, s, v = svd.u, svd.s[..., None, :], svd.vt.mT
    forward, backward = matmul(tangent, v), matmul(tangent.mT, u)
    inside = matmul(u.mT, forward)
    rest_u, rest_v = _project_out(u, forward), _project_out(v, backward)

    def multiply_rest(y):  # a_⊥ y for y orthogonal to v
        return _project_out(u, matmul(a, y))

    def multiply_rest_transposed(x):
        return _project_out(v, matmul(a.mT, x))

    # In units of the largest singular value: scales like 1e±15 square to 0 or infinity.
    unit = jnp.where(s[..., :1] > 0, s[..., :1], 1)
    s = s / unit

    def operator(x):
        once = multiply_rest_transposed(x) / unit
        return x * s**2 - multiply_rest(once) / unit

    right = s * rest_u + multiply_rest(rest_v) / unit
    x = jax.lax.custom_linear_solve(operator, right, _solve_positive, symmetric=True)
    y = safe_divide(rest_v + multiply_rest_transposed(x) / unit, s)
    sides = matmul(x * s, v.mT) + matmul(u, (y * s).mT)
    return matmul(u, matmul(inside, v.mT)) + sides


def _solve_positive(operator, right):
    """Solve operator(x) = right, column by column, by conjugate gradients.

    The columns are independent problems: each has its own step lengths, and stops at its own
    time, when the residual is at the rounding level of its right-hand side.
    """
    eps = jnp.finfo(right.dtype).eps

    def dot(x, y):
        return jnp.sum(x * y, axis=-2, keepdims=True)

    threshold = (4 * eps) ** 2 * dot(right, right)

    def is_open(state):
        step, _, _, _, square = state
        return (step < _MOST_STEPS) & jnp.any(square > threshold)

    def iterate(state):
        step, x, residual, direction, square = state
        active = square > threshold
        image = operator(direction)
        curvature = dot(direction, image)
        usable = active & (curvature > 0)
        length = jnp.where(usable, square / jnp.where(usable, curvature, 1), 0)
        x, residual = x + length * direction, residual - length * image
        following = jnp.where(usable, dot(residual, residual), 0)
        ratio = jnp.where(usable, following / jnp.where(usable, square, 1), 0)
        return step + 1, x, residual, residual + ratio * direction, following

    start = (0, jnp.zeros_like(right), right, right, dot(right, right))
    return jax.lax.while_loop(is_open, iterate, start)[1]


def _project_out(basis, x):
    return x - matmul(basis, matmul(basis.mT, x))
