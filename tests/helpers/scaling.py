"""Arguments and results times powers of two."""

from typing import Any

import numpy as np

from tests.helpers.array_functions import DTYPE, Case, to_tuple


def rescale(arrays: Any, degrees: Any, exponent: int) -> tuple[Any, ...]:
    """Return the arrays times 2**(exponent * degree), in float64 for results."""
    return tuple(
        np.ldexp(np.asarray(array), round(exponent * degree)).astype(
            np.asarray(array).dtype
        )
        for array, degree in zip(arrays, degrees, strict=True)
    )


def assert_same(case: Case, found: Any, expected: Any) -> None:
    eps = np.finfo(DTYPE).eps
    for one, other in zip(to_tuple(found), to_tuple(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        largest = np.abs(other).max(initial=0)
        assert np.isfinite(one).all()
        assert np.abs(one - other).max(initial=0) <= case.tolerance * eps * largest
