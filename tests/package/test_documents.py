"""The README and the pages of docs/ are true: their code runs, their links lead."""

import re

import jax
import pytest

from tests.helpers import source

README = source.ROOT / "README.md"
PAGES = [README, *sorted((source.ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def list_blocks(path):
    return BLOCK.findall(path.read_text())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_code_of_a_page_runs(path, capsys, tmp_path, monkeypatch):
    """The blocks of one page run in order, in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in list_blocks(path):
            exec(compile(block, str(path), "exec"), namespace)


def test_most_pages_have_code():
    with_code = [path.name for path in PAGES if list_blocks(path)]
    assert {"README.md", "quickstart.md", "choosing.md", "layouts.md"} <= set(with_code)
    assert {"lifting.md", "extending.md", "checkpoints.md", "accelerators.md"} <= set(
        with_code
    )


def test_the_readme_prints_what_it_says(capsys):
    (block,) = list_blocks(README)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    text = README.read_text()
    assert printed
    for line in printed:
        assert line in text


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 90
    assert len(README.read_text().split()) <= 700


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not link.startswith(("http:", "https:")):
            assert (path.parent / link).exists(), link
