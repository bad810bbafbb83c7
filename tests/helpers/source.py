"""Reads the source of the project as text: its prose, its bodies, its signatures."""

import ast
import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).parent.parent.parent

# Phrases of docs/contributing that hide an actor or an action; each has a plain word.
BANNED = re.compile(
    r"\b(all but|but for|as it (?:is|was)|as they (?:are|were)|alone|of no account"
    r"|(?:gives?|gave|given|giving) way|(?:comes?|came|coming) back"
    r"|(?:takes?|taken) out"
    r"|(?:is|are|be) gone|turned|settles?|settled|cuts?)\b",
    re.IGNORECASE,
)
THAT_OF = re.compile(r"\b(that|those) of\b", re.IGNORECASE)
WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|pyright:|fmt:)")


def list_files(*folders):
    """Return the Python files of some folders of the project, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def read_prose(path):
    """Return [(line, text)]: the docstrings, comments and messages of a file.

    Examples and code blocks are left out. A message is a string inside a `raise`.
    """
    text = path.read_text()
    if path.suffix == ".md":
        return _read_markdown(text)

    tree = ast.parse(text)
    found = list(_list_docstrings(tree)) + list(_list_messages(tree))
    return sorted(found + list(_list_comments(text)))


def count_words(prose):
    return sum(len(_WORD.findall(text)) for _, text in prose)


def _read_markdown(text):
    text = re.sub(
        r"```.*?```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )
    return [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _list_docstrings(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, kinds) or ast.get_docstring(node) is None:
            continue
        text = ast.get_docstring(node).split("Example:")[0]
        yield node.body[0].lineno, text


def _list_messages(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def _list_comments(text):
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not _DIRECTIVE.match(token.string):
            yield token.start[0], token.string.lstrip("# ")


def list_bodies(path):
    """Return [(name, line, number of lines, has a blank line)] of each function.

    The docstring and nested functions count as part of the body's lines only where
    they stand inside it; the docstring itself never counts.
    """
    text = path.read_text()
    lines = text.splitlines()

    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body:
            first, last = body[0].lineno, body[-1].end_lineno
            inside = lines[first - 1 : last]
            is_airy = any(not line.strip() for line in inside)
            num_lines = sum(bool(line.strip()) for line in inside)
            found.append((node.name, node.lineno, num_lines, is_airy))
    return found
