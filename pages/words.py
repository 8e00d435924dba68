"""The catalogue of the page's words: each in Chinese and in English, by one key."""

from pages.words_chat import CHAT
from pages.words_look import LOOK
from pages.words_watch import WATCH

CATALOGUE: dict[str, tuple[str, str]] = CHAT | LOOK | WATCH  # key: (Chinese, English)
LANGUAGES = ("zh", "en")


class Words:
    """The words of one language: say("counts", read=3, written=5)."""

    def __init__(self, language: str):
        self.language = language

    def __call__(self, key: str, **values) -> str:
        text = CATALOGUE[key][LANGUAGES.index(self.language)]
        return text.format(**values) if values else text
