"""The input of the harness: contenders, groups of contenders, and levels."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A contender that is ready to run: compiled, with its inputs on the device."""

    run: Callable[[], Any]  # one run; returns when everything has been computed
    fetch: Callable[[Any], Any]  # its result → NumPy arrays; not timed
    lower_ms: float | None = None
    compile_ms: float | None = None
    peak_bytes: int | None = None
    temporary_bytes: int | None = None
    pool: str = "xla"  # the library whose threads run it: xla | torch | blas


class Contender(NamedTuple):
    """One implementation of an operation, at one setting."""

    name: str
    prepare: Callable[..., Prepared]  # takes the inputs of the group
    role: str = "peer"  # jlora | peer | limit
    setting: str = "defaults"
    requires: tuple[str, ...] = ()  # modules that must be installed
    most_runs: int | None = None  # None: as many as the level allows
    least_runs: int = 1  # made even if they exceed the time of the level
    skip: str | None = None  # the reason if it is not to be measured here


class Group(NamedTuple):
    """One problem and all of its contenders, timed in interleaved rounds."""

    suite: str
    operation: str
    case: Any  # a Case, or another class with its interface
    make_inputs: Callable[[], tuple]  # NumPy arrays, made once for the group
    contenders: tuple[Contender, ...]
    # (inputs, result) → {kind: value}; the first kind is the one to judge by.
    measure_errors: Callable[[tuple, Any], dict]
    flops: float | None = None  # that every implementation needs
    bytes: float | None = None  # that every implementation moves
    precision: str = "highest"  # of the matrix product that sets the limit in flops


class Level(NamedTuple):
    """The number of runs and the time that each contender gets."""

    name: str  # quick | full
    most_runs: int
    seconds: float  # for all runs of one contender; at least one run is made


QUICK = Level("quick", 7, 0.6)
FULL = Level("full", 7, 2.5)
