"""The package as a whole: what its import costs, and its demonstration."""

import os
import re
import subprocess
import sys

from benchmarks.run.cases import WholeCase
from benchmarks.run.harness import Contender, Group, Prepared

SUITE = "package"
_DEMO = "import sys; from jlora.cli.main import main; sys.exit(main(['demo']))"


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    groups = [_make_import_group()]
    if level_name == "full" and platform == "cpu":
        groups.append(_make_demo_group())
    return groups


def make_whole_run(level_name):
    """Return the (group, contender) that a run of all suites is recorded as."""
    contender = Contender("benchmarks", tuple, "jlora", "all suites")
    group = Group(
        SUITE,
        "all suites",
        WholeCase(level_name),
        tuple,
        (contender,),
        lambda inputs, result: {},
    )
    return group, contender


def _make_import_group():
    contenders = (
        Contender(
            "import jlora",
            lambda: _prepare_command("-c", "import jlora"),
            "jlora",
            least_runs=9,
        ),
        Contender(
            "import jax, optax",
            lambda: _prepare_command("-c", "import jax, optax"),
            least_runs=9,
        ),
    )
    return Group(
        SUITE,
        "import",
        WholeCase("a fresh process"),
        tuple,
        contenders,
        lambda inputs, output: {},
    )


def _make_demo_group():
    contender = Contender(
        "jlora demo",
        lambda: _prepare_command("-c", _DEMO),
        "jlora",
        "in a fresh process, as installed",
        most_runs=1,
    )
    return Group(
        SUITE, "demo", WholeCase("a fresh process"), tuple, (contender,), _read_demo
    )


def _prepare_command(*arguments):
    # As installed: with byte code, whatever this process was told about writing it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def run():
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout

    return Prepared(run, lambda output: output)


def _read_demo(inputs, output):
    """Return what the demonstration printed about the road there and back."""
    saved, before = re.search(
        r"loaded: (\S+) bits per byte, before: (\S+)", output
    ).groups()
    losses = {
        name: float(re.search(rf"^{name}\s+(\S+)", output, re.MULTILINE)[1])
        for name in (
            "no adaptation",
            "V only, from the SVD",
            "classic LoRA",
            "full fine-tuning",
        )
    }
    return {"reloaded loss difference": abs(float(saved) - float(before)), **losses}
