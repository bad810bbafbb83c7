"""Questions and answers by topic, from the files of the package chatterbot-corpus."""

import importlib.util
import pathlib

PACKAGE = "chatterbot_corpus"
# In `tech_support` ten pairs are repeated 105 times, so more topics are needed.
TECHNICAL = ("ai", "coding", "computers", "science", "tech_support", "trivia")


def read_conversations() -> dict[str, list[tuple[str, str]]]:
    """Return {topic: [(question, answer)]} of the English files, each pair once.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    import yaml

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            "The conversations are not installed: `pip install chatterbot-corpus`."
        )
    folder = pathlib.Path(spec.origin).parent / "data" / "english"

    topics = {}
    for path in sorted(folder.glob("*.yml")):
        lines = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        pairs = [(str(each[0]), str(each[1])) for each in lines if len(each) > 1]
        topics[path.stem] = list(dict.fromkeys(pairs))
    return topics
