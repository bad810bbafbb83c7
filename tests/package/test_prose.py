"""The prose of the project is plain English, counted."""

import pytest

from tests.helpers import source

# Per 1,000 words; the limits are the level of well-written packages of this field.
LIMITS = {"that of / those of": (source.THAT_OF, 0.3), "what": (source.WHAT, 1.5)}
PLACES = {
    "jlora": source.list_files("jlora"),
    "benchmarks": source.list_files("benchmarks"),
    "README.md": [source.ROOT / "README.md"],
    "docs": sorted((source.ROOT / "docs").rglob("*.md")),
}


def find_all(pattern, paths):
    """Return ["file:line: text around a match"] in the prose of files."""
    found = []
    for path in paths:
        for line, text in source.read_prose(path):
            for match in pattern.finditer(text):
                around = text[max(0, match.start() - 30) : match.end() + 30]
                found.append(f"{path.name}:{line}: {around!r}")
    return found


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("place", PLACES)
def test_vague_words_are_rare(place, name):
    pattern, limit = LIMITS[name]
    paths = PLACES[place]
    num_words = sum(source.count_words(source.read_prose(path)) for path in paths)
    assert num_words > 300
    found = find_all(pattern, paths)
    assert len(found) <= limit * num_words / 1000, "\n".join(found)


@pytest.mark.parametrize("place", PLACES)
def test_no_phrase_hides_who_does_what(place):
    assert find_all(source.BANNED, PLACES[place]) == []


def test_a_bad_sentence_is_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        '"""What is gone comes back."""\n'
        "# It is that of u, all but the last.\n"
        "def f():\n"
        '    """Return what.\n\n    Example:\n        what that of\n    """\n'
        '    raise ValueError("`a` must be those of b, cut.")\n'
        '    return "what"  # noqa: what\n'
    )

    assert [len(find_all(p, [path])) for p in (source.WHAT, source.THAT_OF)] == [2, 2]
    assert len(find_all(source.BANNED, [path])) == 4
    assert source.count_words(source.read_prose(path)) == 23
