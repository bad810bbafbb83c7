"""The order of the packages: no file imports from a later one."""

import ast

import pytest

from tests.helpers import source

PACKAGE = source.ROOT / "jlora"
MODULES = source.list_files("jlora")
# A file imports only from its own package and from those before it in this list.
PACKAGES = [
    "_interrupt",
    "_types",
    "_checks",
    "_columns",
    "_numerics",
    "_sharding",
    "_dispatch",
    "_processes",
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
    "__main__",
]


def list_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_violations(path, package):
    allowed = PACKAGES[: PACKAGES.index(package) + 1]
    if package == "cli":
        # The demo command starts the demo, which imports no command.
        allowed.append("demo")

    for name in list_imports(path):
        parts = name.split(".")
        if parts[:2] == ["jax", "_src"]:
            yield f"{path.name} imports {name}"
        if parts[0] == "jlora" and parts[1] not in allowed:
            yield f"{path.name} imports {name}, a later package"


def name_package(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_go_upwards_only(path):
    if path != PACKAGE / "__init__.py":
        assert list(find_violations(path, name_package(path))) == []


def test_a_violation_is_found(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("from jlora.training.loop import fit\nfrom jax._src import core\n")
    assert len(list(find_violations(file, "updates"))) == 2


def test_every_package_is_in_the_list():
    names = {name_package(path) for path in MODULES} - {"__init__"}
    assert names == set(PACKAGES)


def test_tests_take_helpers_from_the_helpers_only():
    for path in source.list_files("tests"):
        for name in list_imports(path):
            if name.startswith("tests."):
                assert name.startswith("tests.helpers"), f"{path.name} imports {name}"
