"""English texts and their translations, from catalogues that PyPI packages ship."""

import importlib.util
import pathlib

LANGUAGES = ("fr", "es")
_LONGEST = 60  # characters of a message


def read_messages(package: str, language: str) -> dict[str, str]:
    """Return {message: translation} of all catalogues of an installed package.

    Plural forms, empty translations and texts above 60 characters are left out.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    from babel.messages.mofile import read_mo

    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(
            f"{package} is not installed: `pip install django sphinx babel`."
        )
    root = pathlib.Path(spec.origin).parent

    messages = {}
    for path in sorted(root.rglob(f"locale/{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            catalogue = read_mo(file)
        for message in catalogue:
            if _is_usable(message.id, message.string):
                messages[message.id] = message.string
    return messages


def read_names(language: str) -> dict[str, str]:
    """Return {English name: name} of countries, languages and scripts, from Babel."""
    from babel import Locale

    english, other = Locale("en"), Locale(language)
    names = {}
    for kind in ("territories", "languages", "scripts"):
        translations = getattr(other, kind)
        for code, name in getattr(english, kind).items():
            if code in translations and _is_usable(name, translations[code]):
                names[name] = translations[code]
    return names


def _is_usable(source: object, translation: object) -> bool:
    """Whether both are texts of some length; plural forms are tuples."""
    texts = [each.strip() for each in (source, translation) if isinstance(each, str)]
    return len(texts) == 2 and all(0 < len(text) <= _LONGEST for text in texts)
