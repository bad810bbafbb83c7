"""A result does not depend on values that do not concern it: other matrices of a batch.

A matrix of NaN, Inf or zeros beside another changes no bit of the other's result, and
no bit of its gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.array_functions import (
    FACTORIZATION,
    RECONSTRUCTION,
    TRAINING,
    UPDATES,
    Case,
    to_tuple,
)

# Functions whose leading axis is no batch axis, or that close over an array.
NOT_BATCHED = (
    "apply_many, gather",
    "apply_many, sort",
    "add_low_rank, columns of different scales",
    "apply_factors",
    "stack_factors",
)
CASES = [
    case
    for case in FACTORIZATION + UPDATES + RECONSTRUCTION + TRAINING
    if case.name not in NOT_BATCHED
]


def spoil(array: np.ndarray, value: float) -> jax.Array:
    """Return two matrices: the array, and one that is filled with the value."""
    return jnp.asarray(np.stack([array, np.full_like(array, value)]))


def run_first(case: Case, value: float | None) -> tuple[Any, ...]:
    """Return the results of the first of two matrices."""
    arrays = [
        jnp.asarray(np.stack([a, a])) if value is None else spoil(a, value)
        for a in case.arrays
    ]
    return tuple(result[0] for result in to_tuple(case.fn(*arrays)))


@pytest.mark.parametrize("value", [np.nan, 0.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_matrix_changes_no_other(case, value):
    expected, found = run_first(case, None), run_first(case, value)
    for one, other in zip(found, expected, strict=True):
        assert bool((one == other).all())


@pytest.mark.parametrize("value", [np.nan])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.has_derivative], ids=lambda case: case.name
)
def test_a_bad_matrix_changes_no_gradient(case, value):
    def measure(*arrays: Any) -> Any:
        results = to_tuple(case.fn(*arrays))
        return sum(jnp.sum(jnp.sin(result[0])) for result in results)

    gradient = jax.jit(jax.grad(measure, range(len(case.arrays))))  # one compilation

    def differentiate(value: float | None) -> Any:
        arrays = [
            jnp.asarray(np.stack([a, a])) if value is None else spoil(a, value)
            for a in case.arrays
        ]
        return gradient(*arrays)

    for one, other in zip(differentiate(value), differentiate(None), strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_empty_batch_has_empty_results(case):
    arrays = [jnp.zeros((0, *a.shape), a.dtype) for a in case.arrays]
    single = to_tuple(case.fn(*map(jnp.asarray, case.arrays)))
    for result, one in zip(to_tuple(case.fn(*arrays)), single, strict=True):
        assert result.shape == (0, *one.shape)
