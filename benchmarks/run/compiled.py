"""The group that compiles a program for an accelerator that this machine may lack."""

from collections.abc import Sequence

from benchmarks.run.ahead_of_time import compile_elsewhere, why_not
from benchmarks.run.contenders import Contender, Group, Prepared


def make_compile_group(
    suite: str,
    case,
    target: str,
    program: str,
    name: str,
    setting: str,
    kinds: Sequence[str],
) -> Group:
    """Return the group that compiles one program for one target, in a fresh process.

    Args:
        case: A `Case`, or another class with its interface.
        target: A name of `ahead_of_time.TARGETS`.
        program: A name of `ahead_of_time.PROGRAMS`.
        name: The name of the contender.
        kinds: The results of `compile_elsewhere` to record as errors.
    """

    def prepare():
        return Prepared(lambda: compile_elsewhere(target, program), lambda found: found)

    def measure_errors(inputs, found):
        return {kind.replace("_", " "): found[kind] for kind in kinds}

    contender = Contender(
        name,
        prepare,
        "jlora",
        f"{setting}; the time is of a fresh process",
        most_runs=1,
        skip=why_not(target),
    )
    return Group(
        suite, "compile ahead of time", case, tuple, (contender,), measure_errors
    )
