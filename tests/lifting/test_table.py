"""The table in the docstring of `jlora.lifting` lists every rule given to quax."""

import pathlib
import runpy
import sys

import quax
from jax import lax
from jax.extend.core import primitives

import jlora.lifting
from jlora.lifting import programs  # noqa: F401 (registers the rules)

FOLDER = pathlib.Path(jlora.lifting.__file__).parent


def read_table():
    """Return the rows of the table: [(primitive, file, rule, layout)]."""
    lines = jlora.lifting.__doc__.splitlines()
    rows = [tuple(map(str.strip, line.split("|"))) for line in lines if "|" in line]
    header, rule, *body = rows
    assert header == ("primitive", "file", "rule", "layout of the result")
    assert set("".join(rule)) == {"-"}
    return body


def record_registrations(monkeypatch):
    """Return [(primitive, file, rule)] for each call of `quax.register` in the folder.

    The files run again with a `register` that only records its calls. Registrations in
    a loop are found too. The rules of the package itself stay registered.
    """
    found = []

    def run_file(path):
        def register(primitive, **settings):
            def record(rule):
                found.append((primitive.name, path.stem, rule.__name__))
                return rule

            return record

        monkeypatch.setattr(quax, "register", register)
        runpy.run_path(str(path))

    for path in sorted(FOLDER.glob("*.py")):
        if "quax.register" in path.read_text():
            run_file(path)
    return found


def find_name(name):
    """Return the name that this JAX gives a primitive, such as "remat2" for remat."""
    owner = lax if hasattr(lax, f"{name}_p") else primitives
    primitive = getattr(owner, f"{name}_p", None)  # one of JAX's has no public name
    return primitive.name if primitive else name


def test_table_lists_every_registered_rule_once(monkeypatch):
    registered = record_registrations(monkeypatch)
    assert len(registered) > 20
    listed = [(find_name(name), *others) for name, *others, _ in read_table()]
    assert sorted(listed) == sorted(registered)


def test_table_says_what_happens_to_the_layout():
    assert all(layout for *_, layout in read_table())


def test_lift_imports_every_file_with_rules():
    # The test above runs copies of the files, so it imports no module of the package.
    for _, file, *_ in read_table():
        assert f"jlora.lifting.{file}" in sys.modules
