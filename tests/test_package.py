"""What holds for the package as a whole: the order of its rooms, its docs, its import."""

import ast
import doctest
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest

import jlora

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jlora"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A file imports only from its own room and from rooms before it in this list.
ROOMS = [
    "_types",
    "_checks",
    "_numerics",
    "_dispatch",
    "_progress",
    "factors",
    "layouts",
    "quantization",
    "factorization",
    "rank_selection",
    "updates",
    "reconstruction",
    "initializers",
    "adaptation",
    "lifting",
    "training",
    "checkpoints",
    "cli",
    "demo",
]


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_violations(path, room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    if room == "cli":
        allowed.append(
            "demo"
        )  # the demo command starts the demo, which imports no command
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[:2] == ["jax", "_src"]:
            yield f"{path.name} imports {name}"
        if parts[0] == "jlora" and parts[1] not in allowed:
            yield f"{path.name} imports {name}, a later room"


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_upwards_only(path):
    if path != PACKAGE / "__init__.py":
        assert list(find_violations(path, room_of(path))) == []


def test_a_violation_is_found(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("from jlora.training.loop import fit\nfrom jax._src import core\n")
    assert len(list(find_violations(file, "updates"))) == 2


def list_public():
    """Return {name: object} of the top level and of each sub-package."""
    found = {name: getattr(jlora, name) for name in jlora.__all__}
    for package in map(vars(jlora).get, ROOMS):
        for name in getattr(package, "__all__", ()):
            found.setdefault(name, getattr(package, name))
    return found


@pytest.mark.parametrize("name", list_public())
def test_public_name_has_a_docstring_whose_example_runs(name):
    tests = doctest.DocTestFinder(recurse=False).find(
        list_public()[name], name, globs={}
    )
    assert tests, f"{name} has no docstring"
    assert "Example:" in tests[0].docstring
    with jlora_promotion():
        result = doctest.DocTestRunner().run(tests[0])
    assert result.attempted > 0
    assert result.failed == 0


def jlora_promotion():
    import jax

    return jax.numpy_dtype_promotion("standard")


def test_no_function_has_the_name_of_a_module():
    # cli/ has one file a command, named after it, and nothing in it is imported by users.
    modules = {path.stem for path in MODULES if room_of(path) != "cli"}
    functions = {name for name in list_public() if name.islower()}
    assert modules & functions == set()


def test_readme_example_runs(capsys):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert blocks
    with jlora_promotion():
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
    assert "error" in capsys.readouterr().out


def test_import_loads_no_extra_and_adds_at_most_a_tenth():
    extras = ("quax", "orbax", "matplotlib", "torch", "scipy.linalg")
    code = f"import sys, jlora; print([name for name in {extras!r} if name in sys.modules])"
    assert run_python(code).strip() == "[]"
    # A full garbage collection of all that JAX holds takes as long as our whole import, and in
    # which of the two it falls is a matter of how many objects a version of JAX makes.
    plain, ours = (
        f"import gc; gc.disable(); import {names}" for names in ("jax, optax", "jlora")
    )
    run_python(ours)  # writes the byte code
    # Processor time, which a busy machine hardly moves; the least of several, as noise only adds.
    least = {plain: float("inf"), ours: float("inf")}
    for repetition in range(24):
        for code, seconds in least.items():
            start = measure_children_seconds()
            run_python(code)
            least[code] = min(seconds, measure_children_seconds() - start)
        if repetition >= 4 and least[ours] <= 1.1 * least[plain]:
            return
    pytest.fail(
        f"import jlora takes {least[ours]:.3f} s, jax and optax {least[plain]:.3f} s"
    )


def measure_children_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run_python(code):
    # As installed: with byte code, whatever this process was told about writing it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
