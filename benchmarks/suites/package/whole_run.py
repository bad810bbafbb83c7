"""The record of a run of all suites."""

from benchmarks.run.cases import WholeCase
from benchmarks.run.contenders import Contender, Group


def make_whole_run(level_name):
    """Return the (group, contender) that a run of all suites is recorded as."""
    contender = Contender("benchmarks", tuple, "jlora", "all suites")
    group = Group(
        "package",
        "all suites",
        WholeCase(level_name),
        tuple,
        (contender,),
        lambda inputs, result: {},
    )
    return group, contender
