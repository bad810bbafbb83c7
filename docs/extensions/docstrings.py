"""Rewrites jlora's docstrings to Markdown that the page builder understands.

Args, Returns and Raises are sections that it knows. Example becomes its section
Examples; Cost, Accuracy, Gradients and Source become paragraphs with a bold title; a
list of files in the docstring of a package becomes a code block. The comment behind a
field becomes its description.
"""

import inspect
import re
import textwrap
from typing import Any

import griffe

_TITLE = re.compile(
    r"^(Cost|Accuracy|Gradients|Accuracy, Gradients|Source|Shapes):\s*(.*)$"
)
_ENTRIES = re.compile(r"^[A-Z][\w ]*:$")
_KNOWN = ("Args:", "Returns:", "Raises:")
_FILES = re.compile(r"^(\w+\.py|\w+/)(, \w+\.py|, \w+/)*\s{2,}|^\w+(/|\.py)?\s{2,}\S")


class PlainSections(griffe.Extension):
    """Rewrites each docstring as it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            _describe_field(obj)
            return
        text = inspect.cleandoc(obj.docstring.value)
        rewrite = _fence_files if obj.is_module else _rewrite_sections
        obj.docstring.value = rewrite(text)


def _describe_field(obj: griffe.Object) -> None:
    """Give a field of a class the comment behind it as its docstring."""
    is_field = obj.is_attribute and obj.parent is not None and obj.parent.is_class
    if not is_field or obj.name.startswith("_") or not obj.lines:
        return
    comment = re.search(r"\s# (?!noqa)(.*)$", obj.lines[-1])
    if comment:
        obj.docstring = griffe.Docstring(comment[1], parent=obj)


def _rewrite_sections(text: str) -> str:
    lines = text.splitlines()
    result, index = [], 0
    while index < len(lines):
        line, end = lines[index], _find_end(lines, index)
        block = textwrap.dedent("\n".join(lines[index + 1 : end])).splitlines()
        if line == "Example:":
            return "\n".join([*result, "Examples:", *lines[index + 1 :]])
        # Markdown takes "[a] [b]" for a link.
        line = line.replace("] [", "] \\[")
        if match := _TITLE.match(line):
            result += [f"**{match[1]}:** {match[2]}", *block, ""]
            index = end
        elif _ENTRIES.match(line) and line not in _KNOWN and block:
            result += [line, "", *_list_entries(block), ""]
            index = end
        else:
            result.append(line)
            index += 1
    return "\n".join(result)


def _find_end(lines: list[str], index: int) -> int:
    """Return the end of the indented block after a line."""
    end = index + 1
    while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
        end += 1
    return end


def _list_entries(block: list[str]) -> list[str]:
    """Return lines `name: text` as items of a list."""
    return [
        re.sub(r"^(\w+): ", r"- `\1`: ", line) if not line.startswith(" ") else line
        for line in block
    ]


def _fence_files(text: str) -> str:
    """Return the docstring of a package with its list of files as a code block."""
    paragraphs = text.split("\n\n")
    fenced = [
        f"```text\n{textwrap.dedent(paragraph)}\n```"
        if _FILES.match(textwrap.dedent(paragraph)) and " | " not in paragraph
        else paragraph
        for paragraph in paragraphs
    ]
    return "\n\n".join(fenced)
