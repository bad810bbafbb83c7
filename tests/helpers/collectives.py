"""The collectives of a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# "%name = f32[8,64]{1,0} all-reduce(...)", also started, and of several arrays.
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b\w+\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    num_elements: int  # of its result
    computation: str  # the name of the computation that holds it, such as a loop's body


def list_collectives(program):
    """Return the collectives of a compiled program, or of its text."""
    text = program if isinstance(program, str) else program.as_text()
    found, computation = [], ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split()[1 if line.startswith("ENTRY") else 0]
        match = _COLLECTIVE.search(line)
        if match:
            sizes = _ARRAY.findall(match[1])
            num = sum(math.prod(map(int, filter(None, s.split(",")))) for s in sizes)
            found.append(Collective(match[2], num, computation))
    return found


def check_thin(program, limit):
    """Fail if a collective of the program moves more than `limit` numbers."""
    wide = [one for one in list_collectives(program) if one.num_elements > limit]
    assert not wide, f"collectives of more than {limit} numbers: {wide}"


def check_none(program):
    """Fail if a program has a collective."""
    found = list_collectives(program)
    assert not found, f"collectives: {found}"
