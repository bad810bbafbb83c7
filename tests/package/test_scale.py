"""No result depends on the scale of its input: every public function that takes arrays.

Each case says how its results scale with its arguments: an argument is multiplied by
c**d, a result then is c**D times what it was. With c a power of two the two results are
the same up to rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.array_functions import CASES, draw, to_tuple
from tests.helpers.matrices import X64
from tests.helpers.scaling import assert_same, rescale

# Powers of two for c. The largest entries stay normal numbers with room for sums.
EXPONENTS = (-900, 900) if X64 else (-100, -54, 100)


def list_scaled() -> list[Any]:
    return [
        pytest.param(case, degrees, exponent, id=f"{case.name}-{degrees[0]}-{exponent}")
        for case in CASES
        for degrees in case.degrees
        for exponent in EXPONENTS
    ]


@functools.cache
def jit_jvp(fn: Any) -> Any:
    return jax.jit(lambda arrays, tangents: jax.jvp(_as_tuple(fn), arrays, tangents)[1])


@functools.cache
def jit_vjp(fn: Any) -> Any:
    return jax.jit(
        lambda arrays, cotangents: jax.vjp(_as_tuple(fn), *arrays)[1](cotangents)
    )


def _as_tuple(fn: Any) -> Any:
    return lambda *arrays: to_tuple(fn(*arrays))


@pytest.mark.parametrize(("case", "degrees", "exponent"), list_scaled())
def test_results_scale_with_their_arguments(case, degrees, exponent):
    of_arguments, of_results = degrees
    expected = to_tuple(case.fn(*map(jnp.asarray, case.arrays)))
    arrays = map(jnp.asarray, rescale(case.arrays, of_arguments, exponent))
    found = to_tuple(case.fn(*arrays))
    back = [-degree for degree in of_results]
    assert_same(case, rescale(found, back, exponent), expected)


@pytest.mark.parametrize(
    ("case", "degrees", "exponent"),
    [param for param in list_scaled() if param.values[0].has_derivative],
)
def test_jvp_scales_with_the_arguments(case, degrees, exponent):
    of_arguments, of_results = degrees
    tangents = tuple(draw(*a.shape, seed=9) for a in case.arrays)

    def differentiate(arrays: Any, tangents: Any) -> Any:
        pairs = (tuple(map(jnp.asarray, each)) for each in (arrays, tangents))
        return to_tuple(jit_jvp(case.fn)(*pairs))

    expected = differentiate(case.arrays, tangents)
    found = differentiate(
        rescale(case.arrays, of_arguments, exponent),
        rescale(tangents, of_arguments, exponent),
    )
    back = [-degree for degree in of_results]
    assert_same(case, rescale(found, back, exponent), expected)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.has_derivative], ids=lambda case: case.name
)
def test_gradients_are_linear_in_the_cotangent(case, exponent):
    arrays = tuple(map(jnp.asarray, case.arrays))
    shapes = jax.eval_shape(_as_tuple(case.fn), *arrays)
    cotangents = tuple(draw(*result.shape, seed=11) for result in shapes)

    pull_back = jit_vjp(case.fn)
    expected = pull_back(arrays, tuple(map(jnp.asarray, cotangents)))
    ones = [1] * len(cotangents)
    scaled = map(jnp.asarray, rescale(cotangents, ones, exponent))
    found = pull_back(arrays, tuple(scaled))
    back = [-1] * len(found)
    assert_same(case, rescale(found, back, exponent), expected)
