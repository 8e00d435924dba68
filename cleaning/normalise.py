"""One spelling for one text: what differs only in invisible ways is made equal, what is visible stays.

NFC, not NFKC: compatibility forms would turn Chinese punctuation （，！） into ASCII and ② into 2. Of them only
full-width letters and digits are brought to ASCII, since a small vocabulary should not learn the alphabet twice.
"""

import re
import unicodedata

LINE_ENDS = re.compile(r"\r\n?|\x85|\u2028|\u2029")
SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f]")  # as wide as a space, but not the character
# Control characters but tab and line feed, marks without width (the joiner U+200D stays: emoji need it), marks of
# writing direction, the byte-order mark, halves of surrogate pairs and code points that are no characters.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
INDENT = re.compile(r"^\u3000+", re.MULTILINE)  # a Chinese paragraph's first-line indent
TRAILING = re.compile(r"[ \t\u3000]+$", re.MULTILINE)
BLANK_LINES = re.compile(r"\n{3,}")
FULL_WIDTH = {ord(wide): ord(wide) - 0xFEE0 for wide in map(chr, range(0xFF10, 0xFF5B)) if wide.isalnum()}
FULL_WIDTH[0x3000] = 0x20  # the space as wide as a Chinese character


def normalise_text(text: str) -> str:
    """The text with one kind of line end and space, without invisible characters, in NFC. Idempotent."""
    text = LINE_ENDS.sub("\n", text)
    text = INVISIBLE.sub("", SPACES.sub(" ", text))
    text = unicodedata.normalize("NFC", INDENT.sub("", text)).translate(FULL_WIDTH)
    text = TRAILING.sub("", text).strip("\n")
    return BLANK_LINES.sub("\n\n", text) if text.strip() else ""


def normalise_row(row: dict) -> dict:
    """All human text of a row in any of the three shapes; tools and calls are JSON and stay as they are."""
    if "text" in row:
        return {"text": normalise_text(row["text"])}
    return {key: [_message(message) for message in messages] for key, messages in row.items()}


def _message(message: dict) -> dict:
    texts = {key: normalise_text(message[key]).strip() for key in ("content", "reasoning_content") if key in message}
    return {**message, **texts}
