"""The source reads well, counted: annotations, air, sizes, line breaks by ruff."""

import ast
import statistics

import pytest

from tests.helpers import source

PACKAGE = source.list_files("jlora")
EVERYTHING = source.list_files("jlora", "benchmarks", "tests")


def list_public_functions(path):
    """Yield (name, arguments without annotation, whether the return is annotated)."""
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            is_function = isinstance(member, ast.FunctionDef)

            if is_function and not member.name.startswith("_"):
                arguments = member.args
                every = (
                    *arguments.posonlyargs,
                    *arguments.args,
                    *arguments.kwonlyargs,
                )
                bare = [
                    argument.arg
                    for argument in every
                    if argument.annotation is None
                    and argument.arg not in ("self", "cls")
                ]
                yield f"{path.name}:{member.name}", bare, member.returns is not None


def test_public_functions_are_annotated():
    functions = [f for path in PACKAGE for f in list_public_functions(path)]
    assert len(functions) > 150
    assert [f"{name} {bare}" for name, bare, _ in functions if bare] == []
    assert [name for name, _, has_return in functions if not has_return] == []


def test_fields_of_containers_are_annotated_with_shapes():
    found = []
    for path in PACKAGE:
        for node in ast.parse(path.read_text()).body:
            bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
            if isinstance(node, ast.ClassDef) and "NamedTuple" in bases:
                found += [
                    f"{path.name}:{node.name}.{ast.unparse(field.target)}"
                    for field in node.body
                    if isinstance(field, ast.AnnAssign)
                    and ast.unparse(field.annotation) in ("jax.Array", "np.ndarray")
                ]

    assert found == []


def test_the_package_says_that_it_is_typed():
    assert (source.ROOT / "jlora" / "py.typed").exists()


def test_ruff_decides_every_line_break():
    directive = "# fmt: " + "skip"
    assert [path.name for path in EVERYTHING if directive in path.read_text()] == []


def test_bodies_have_paragraphs_and_are_short():
    bodies = [body for path in PACKAGE for body in source.list_bodies(path)]
    sizes = [num_lines for _, _, num_lines, _ in bodies]
    assert statistics.median(sizes) < 15
    assert [body for body in bodies if body[2] > 60] == []

    long = [body for body in bodies if body[2] >= 12]
    dense = [name for name, _, _, is_airy in long if not is_airy]
    assert len(dense) < 0.25 * len(long), dense


@pytest.mark.parametrize("folder", ["jlora", "benchmarks"])
def test_files_are_short(folder):
    sizes = [len(p.read_text().splitlines()) for p in source.list_files(folder)]
    assert statistics.median(sizes) < 150
    assert max(sizes) <= 300


def test_no_name_of_an_initializer_is_compared_in_adaptation():
    import jlora.initializers.lookup

    names = jlora.initializers.lookup.list_names()
    found = []
    for path in source.list_files("jlora/adaptation"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = [n for n in ast.walk(node) if isinstance(n, ast.Constant)]
                found += [
                    f"{path.name}:{node.lineno}"
                    for constant in constants
                    if constant.value in names
                ]
    assert found == []
