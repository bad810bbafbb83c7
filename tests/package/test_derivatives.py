"""Derivatives are those of the function itself: against central differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.array_functions import CASES, Case, as_svd, draw, draw_svd, to_tuple
from tests.helpers.matrices import needs_x64

STEP = 1e-6
SVD = draw_svd(12, 10, 3)
X, Y = draw(12, 2), draw(2, 10)

# The obvious algorithm orthonormalises rows that are dependent, and has no derivative.
DEGENERATE = [
    Case(
        "add_low_rank inside the bases",
        lambda x, y: jlora.updates.add_low_rank(as_svd(*SVD), x, y, rank=3),
        (SVD[0][:, :2], SVD[2][:2]),
        (),
    ),
    Case(
        "add_low_rank of a repeated column",
        lambda x, y: jlora.updates.add_low_rank(as_svd(*SVD), x, y, rank=4),
        (np.stack([X[:, 0]] * 2, -1), Y),
        (),
    ),
    Case(
        "recompress dependent columns",
        lambda u, v: jlora.recompress(jlora.Factors(u, v), 2),
        (np.concatenate([X, X], -1), draw(4, 10)),
        (),
    ),
    Case(
        "recompress to less than the whole",
        lambda u, v: jlora.recompress(jlora.Factors(u, v), 2),
        (draw(12, 6), draw(6, 10)),
        (),
    ),
    Case(
        "recompress with more columns than rows",
        lambda u, v: jlora.recompress(jlora.Factors(u, v), 2),
        (draw(5, 7), draw(7, 4)),
        (),
    ),
    Case(
        "remove_columns",
        lambda u, s, vt: jlora.updates.remove_columns(as_svd(u, s, vt), 8),
        SVD,
        (),
    ),
    Case(
        "precondition_gradient of dependent columns",
        lambda u, v, du, dv: jlora.training.precondition_gradient(
            jlora.Factors(u, v), jlora.Factors(du, dv), delta=1e-3
        ),
        (np.stack([X[:, 0]] * 2, -1), Y, draw(12, 2, seed=2), draw(2, 10, seed=3)),
        (),
    ),
]


def draw_tangent(a: np.ndarray) -> jax.Array:
    """Return a direction; of an orthonormal array one that keeps it orthonormal.

    The updates of an SVD assume that, and are not defined across it.
    """
    d = draw(*a.shape, seed=9)
    if a.ndim != 2:
        return jnp.asarray(d)
    wide = a if a.shape[0] < a.shape[1] else a.T
    if not np.allclose(wide @ wide.T, np.eye(len(wide))):
        return jnp.asarray(d)
    d = d if wide is a else d.T
    inside = d @ wide.T
    d = d - (inside + inside.T) @ wide / 2
    return jnp.asarray(d if wide is a else d.T)


@needs_x64
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.has_derivative] + DEGENERATE,
    ids=lambda case: case.name,
)
def test_jvp_is_the_slope(case):
    arrays = tuple(map(jnp.asarray, case.arrays))
    tangents = tuple(map(draw_tangent, case.arrays))

    def evaluate(*arrays: Any) -> tuple[Any, ...]:
        return to_tuple(case.fn(*arrays))

    ends = [
        evaluate(*(a + sign * STEP * t for a, t in zip(arrays, tangents, strict=True)))
        for sign in (1, -1)
    ]
    found = jax.jvp(evaluate, arrays, tangents)[1]
    for plus, minus, slope in zip(*ends, found, strict=True):
        expected = (plus - minus) / (2 * STEP)
        largest = max(float(jnp.abs(expected).max()), 1.0)
        # Central differences have an error of STEP² and of eps / STEP.
        np.testing.assert_allclose(slope, expected, atol=1e-6 * largest)


@needs_x64
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.has_derivative] + DEGENERATE,
    ids=lambda case: case.name,
)
def test_vjp_is_the_transpose_of_jvp(case):
    arrays = tuple(map(jnp.asarray, case.arrays))
    tangents = tuple(jnp.asarray(draw(*a.shape, seed=9)) for a in arrays)
    results, slopes = jax.jvp(lambda *a: to_tuple(case.fn(*a)), arrays, tangents)
    cotangents = tuple(jnp.asarray(draw(*r.shape, seed=11)) for r in results)
    _, pull_back = jax.vjp(lambda *a: to_tuple(case.fn(*a)), *arrays)

    left = sum(jnp.vdot(c, s) for c, s in zip(cotangents, slopes, strict=True))
    right = sum(
        jnp.vdot(g, t) for g, t in zip(pull_back(cotangents), tangents, strict=True)
    )
    np.testing.assert_allclose(left, right, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("zero", lambda u: jlora.recompress(jlora.Factors(u, jnp.eye(3)), 2).u),
        (
            "repeated",
            lambda u: jlora.truncated_svd(u @ jnp.eye(3), 2).u,
        ),
        ("no gap", lambda u: jlora.low_rank_approximation(u, 2, key=jax.random.key(0))),
    ],
)
def test_there_is_no_derivative_without_one(name, fn):
    u = {
        "zero": jnp.ones((4, 3)),
        "repeated": jnp.eye(4, 3),
        "no gap": jnp.eye(4, 3),
    }[name]
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    gradient = jax.grad(lambda u: jnp.sum(fn(u)[:, :2] * weights[:, :2]))(u)
    assert not bool(jnp.isfinite(gradient).all())
