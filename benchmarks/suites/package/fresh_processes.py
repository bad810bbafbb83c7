"""The import of the package and its demonstration, in processes of their own."""

import os
import re
import subprocess
import sys

from benchmarks.run.cases import WholeCase
from benchmarks.run.contenders import Contender, Group, Prepared

SUITE = "package"
_CASE = WholeCase("a fresh process")
_DEMO = "import sys; from jlora.cli.main import main; sys.exit(main(['demo']))"


def make_import_group():
    """Return the group of the import of jlora, beside the imports that it needs."""
    contenders = (
        Contender(
            "import jlora",
            lambda: _prepare_python("import jlora"),
            "jlora",
            least_runs=9,
        ),
        Contender(
            "import jax, optax",
            lambda: _prepare_python("import jax, optax"),
            least_runs=9,
        ),
    )

    return Group(SUITE, "import", _CASE, tuple, contenders, lambda inputs, output: {})


def make_demo_group():
    """Return the group of one run of `jlora demo`."""
    contender = Contender(
        "jlora demo",
        lambda: _prepare_python(_DEMO),
        "jlora",
        "in a fresh process, as installed",
        most_runs=1,
    )
    return Group(SUITE, "demo", _CASE, tuple, (contender,), _read_demo)


def _prepare_python(code):
    # As installed: with byte code, even if this process was told not to write it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return done.stdout

    return Prepared(run, lambda output: output)


def _read_demo(inputs, output):
    """Return the losses that the demonstration printed.

    The first is the change of the loss when the weights were saved and loaded again.
    """
    saved, before = re.search(
        r"loaded: (\S+) bits per byte, before: (\S+)", output
    ).groups()

    losses = {}
    for name in (
        "no adaptation",
        "V only, from the SVD",
        "classic LoRA",
        "full fine-tuning",
    ):
        line = re.search(rf"^{name}\s+(\S+)", output, re.MULTILINE)
        losses[name] = float(line[1])
    return {"reloaded loss difference": abs(float(saved) - float(before)), **losses}
