"""One figure that the project aims at."""

from collections.abc import Callable
from typing import NamedTuple


class Worst(NamedTuple):
    """The worst value over some cases, and the number of cases without a value."""

    value: float | None
    num_missing: int
    num_cases: int


class Target(NamedTuple):
    """One figure and its bound.

    `measure` reads the figure from {key: record} and returns None where a record is
    missing. Over several cases it returns a `Worst`.
    """

    part: int  # of the project, as its issues are numbered
    name: str
    bound: float
    measure: Callable[[dict], float | Worst | None]
    at_least: bool = False  # the bound is a least value, not a largest one
