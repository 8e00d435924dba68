"""The catalogue of the page's words: each in Chinese and in English, by one key."""

from common import words
from pages.words_chat import CHAT
from pages.words_look import LOOK
from pages.words_watch import WATCH

CATALOGUE: words.Catalogue = CHAT | LOOK | WATCH


class Words(words.Words):
    """The page's words of one language."""

    catalogue = CATALOGUE
