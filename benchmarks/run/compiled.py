"""A group that compiles a program for an accelerator that need not be here."""

from benchmarks.run.ahead_of_time import compile_elsewhere, why_not
from benchmarks.run.harness import Contender, Group, Prepared


def make_compile_group(suite, case, target, program, name, setting, kinds):
    """Return the group; `kinds` of what `compile_elsewhere` found are recorded as its errors."""

    def prepare():
        return Prepared(lambda: compile_elsewhere(target, program), lambda found: found)

    def read(inputs, found):
        return {kind.replace("_", " "): found[kind] for kind in kinds}

    ours = Contender(
        name,
        prepare,
        "jlora",
        f"{setting}; the time is of a fresh process",
        most_runs=1,
        skip=why_not(target),
    )
    return Group(suite, "compile ahead of time", case, tuple, (ours,), read)
