"""Which rows are worth learning from. Every test is a pure function and gives the reason for which it drops a row.

The thresholds of the default profile were set by reading what they drop from 108,000 rows of public Chinese and English
text and chat (docs/data.md has the counts). They are loose on purpose: they should drop what is not language, and keep
language that is merely plain.
"""

import re
from dataclasses import dataclass

from data.row_shapes import Dropped

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
V1_HAN = re.compile(r"[\u4e00-\u9fff]")  # what MiniMind v1 counted as Chinese
SCRIPTS = {
    "kana": re.compile(r"[\u3041-\u30fa\u31f0-\u31ff]"), "hangul": re.compile(r"[\u1100-\u11ff\uac00-\ud7af]"),
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"), "cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "arabic": re.compile(r"[\u0600-\u06ff]"), "indic": re.compile(r"[\u0900-\u0dff]"),
    "thai": re.compile(r"[\u0e00-\u0e7f]"), "greek": re.compile(r"[\u0370-\u03ff]"),
}  # fmt: skip
LANGUAGES = ("zh", "en", "code", "ja", "ko", "latin", "cyrillic", "arabic", "indic", "thai", "greek")
LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
ENGLISH_WORDS = frozenset(re.findall(r"\w+", """
    the of and to a in is it that for was on as with be by at from this are or an not have you he his but they which i
    we can if will all has there one her she their what so my no me your do when would who
"""))  # fmt: skip
# Neither letter, digit, space, the punctuation of Chinese and English prose, nor a sign of formulas and code.
SYMBOL = re.compile(r"""[^\w\s，。、；：？！“”‘’（）《》〈〉【】「」『』—…·～,.;:?!'"()\[\]/%+=<>*^$\\{}|×÷±≤≥≠-]""")
LOST = re.compile(r"\ufffd|<unk>|锟斤拷|烫烫烫|Ã[\x80-\xbf©¨¤¶¼]|â€")  # what wrong decoding leaves behind
PLACEHOLDER = re.compile(r"\{\{(name|author)\}\}")
JUDGED_CHARS = 20_000  # longer texts are judged by their beginning
GRAM = 8
PADDING = re.compile(r"([\W_])\1+")
CODE_SIGN = re.compile(r"[{}()\[\]<>=;_\\|$]")


@dataclass(frozen=True)
class Profile:
    """Thresholds. Lengths are characters; shares lie in [0, 1]; None or 1 switches a test off."""

    min_chars: int = 10  # below it a document is a title or a scrap
    max_chars: int = 2_000_000  # the whole of a long novel; the trainer continues a document over several rows
    min_question: int = 1
    min_answer: int = 1
    max_turn: int = 20_000
    languages: tuple[str, ...] | None = ("zh", "en", "code")
    min_chinese: float = 0.0  # of all characters of a document; English is welcome
    min_chinese_turn: float = 0.0  # of all characters of each question and answer
    max_symbols: float = 0.3
    max_repetition: float = 0.7
    max_lost: float = 0.01
    chat_text: bool = True  # whether the tests of text are made on conversations and pairs too


PROFILES = {
    "default": Profile(),
    # MiniMind v1's data_process.py: pretraining texts of at most 512 characters; questions of 10 to 256 and answers of
    # 5 to 256 characters, of which more than 0.9 are Chinese. It drops all English, all long answers and most answers
    # with digits or much punctuation; kept for comparison.
    "minimind-v1": Profile(min_chars=1, max_chars=512, min_question=10, min_answer=5, max_turn=256, languages=None,
                           min_chinese_turn=0.9, max_symbols=1, max_repetition=1, max_lost=1, chat_text=False),
}  # fmt: skip


def check_row(row: dict, profile: Profile) -> None:
    """Raises Dropped if the row, normalised and in one of the three shapes, fails a test of the profile."""
    if "text" in row:
        text = row["text"]
        _check_length(text, profile)
        _check_text(text, profile)
        return
    for messages in row.values():
        _check_turns(messages, profile)
        text = "\n".join(message["content"] for message in messages)
        if match := PLACEHOLDER.search(text):
            raise Dropped("unfilled placeholder", f"{match[0]}: fill it with data_process.py fill")
        if profile.chat_text:
            _check_text(text, profile)


def _check_length(text: str, profile: Profile):
    if not text:
        raise Dropped("empty")
    if len(text) < profile.min_chars:
        raise Dropped("too short", f"{len(text)} characters")
    if len(text) > profile.max_chars:
        raise Dropped("too long", f"{len(text)} characters")
    _check_chinese(text, profile.min_chinese)


def _check_turns(messages: list[dict], profile: Profile):
    for i, message in enumerate(messages):
        role, text = message["role"], message["content"]
        # An answer may be empty where it is a call of a tool. System turns and tools' results may be anything.
        if role == "assistant" and not text and not message.get("tool_calls"):
            raise Dropped("empty answer", f"message {i}")
        if role == "user" and not text:
            raise Dropped("empty question", f"message {i}")
        if role not in ("user", "assistant") or not text:
            continue
        least = profile.min_question if role == "user" else profile.min_answer
        if len(text) < least:
            raise Dropped("too short", f"message {i} has {len(text)} characters")
        if len(text) > profile.max_turn:
            raise Dropped("too long", f"message {i} has {len(text)} characters")
        _check_chinese(text, profile.min_chinese_turn)
        asked = messages[i - 1]["content"] if i else ""
        # A short answer may repeat the question and be right (a greeting, a name); a long one teaches to echo.
        if role == "assistant" and len(text) > 8 and text == asked:
            raise Dropped("answer repeats the question", f"message {i}")


def _check_chinese(text: str, least: float):
    share = len(V1_HAN.findall(text)) / len(text)
    if least and share <= least:
        raise Dropped("too little Chinese", f"{share:.2f} of the characters")


def _check_text(text: str, profile: Profile):
    # In this order, so that the reason says what is wrong: a text of lost characters would fail the later tests too.
    text = text[:JUDGED_CHARS]
    share = lost_share(text)
    if share > profile.max_lost:
        raise Dropped("lost characters", f"{share:.3f} marks a character")
    share = symbol_share(text)
    if share > profile.max_symbols:
        raise Dropped("symbol noise", f"{share:.2f} of the characters")
    share = repetition(text)
    if share > profile.max_repetition:
        raise Dropped("repetition", f"{share:.2f} of its {GRAM}-grams stood before")
    if profile.languages is not None:
        language = language_of(text)
        if language not in (*profile.languages, "none"):
            raise Dropped("other language", language)


# -------------------------------------------------------------------------------------------------------- measures
def lost_share(text: str) -> float:
    """Marks of lost characters (U+FFFD, <unk>, mojibake) per character."""
    return len(LOST.findall(text)) / max(len(text), 1)


def symbol_share(text: str) -> float:
    """Share of symbols among the characters that are no space."""
    return len(SYMBOL.findall(text)) / max(len(text) - sum(map(str.isspace, text)), 1)


def repetition(text: str) -> float:
    """Share of the character 8-grams that stood earlier in the text: 0 for prose, near 1 for an echo.

    Runs of one space or mark count as one: tables are padded with them and say something all the same.
    """
    text = PADDING.sub(r"\1", text)
    grams = len(text) - GRAM + 1  # so many begin in the text; with few of them the share says nothing
    return 1 - len({text[i : i + GRAM] for i in range(grams)}) / grams if grams > GRAM else 0.0


def language_of(text: str) -> str:
    """One of "zh", "ja", "ko", "en", "code", "latin" (another language in Latin letters), a script's name, or "none".

    By script, a Chinese character weighing as much as three Latin letters, as in UTF-8. English is told by its
    function words: one word in fifty (in a short text none need be), but one in ten where more than one letter in fifty
    bears an accent. Where they are missing, code is told by its signs. "none" has no letters (a number).
    """
    text = text[:JUDGED_CHARS]
    counts = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    han, kana = len(HAN.findall(text)), counts.pop("kana")
    name = max(counts, key=counts.get)
    # Japanese is mostly written in Chinese characters; a tenth of kana among them tells it.
    if kana > 0.1 * (han + kana) and 3 * (han + kana) >= counts[name]:
        return "ja"
    if 3 * han >= counts[name]:
        return "zh" if han else "none"
    if name != "latin":
        return {"hangul": "ko"}.get(name, name)
    # Latin letters: English, another language, or code. An accent makes English less likely, so more of its words are
    # asked for.
    words = LATIN_WORD.findall(text.lower())
    accented = sum(character > "\u00bf" for word in words for character in word)
    common = sum(word in ENGLISH_WORDS for word in words)
    if common >= (0.1 if accented > 0.02 * counts["latin"] else 0.02 if len(words) >= 50 else 0) * len(words):
        return "en"
    return "code" if len(CODE_SIGN.findall(text)) > 0.04 * len(text) else "latin"
