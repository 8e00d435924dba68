"""Sentences in Chinese and in English under one key, for what speaks to somebody who has only just arrived."""

import locale
import os

LANGUAGES = ("zh", "en")
Catalogue = dict[str, tuple[str, str]]  # key: (Chinese, English)


class Words:
    """The sentences of one language: say("counts", read=3, written=5). A subclass names its catalogue."""

    catalogue: Catalogue = {}

    def __init__(self, language: str):
        self.language = language

    def __call__(self, key: str, **values) -> str:
        text = self.catalogue[key][LANGUAGES.index(self.language)]
        return text.format(**values) if values else text


def language_here() -> str:
    """ "zh" where the locale of this terminal is Chinese, else "en"."""
    # The first variable that is set decides, as for other programs. Windows sets none and has names of its own.
    named = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), locale.getlocale()[0] or "")
    return "zh" if named.startswith(("zh", "Chinese")) else "en"
