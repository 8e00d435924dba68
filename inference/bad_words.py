"""Words that must not stand in an answer.

The same word can be written with different tokens, so a ban of one spelling would not keep it out. Here a token is
banned where the bytes of the answer so far and its own would hold the word.
"""

from functools import cache


class BadWords:
    """Follows one answer. token_bytes: what each entry of the vocabulary adds to the text, b"" for a marker."""

    def __init__(self, words: list[str], token_bytes: list[bytes]):
        self.words, self.token_bytes = [word.encode() for word in words], token_bytes
        self.tail = b""  # the end of the answer: as much of it as can be the beginning of a word
        self.kept = max(map(len, self.words)) - 1
        self.whole = {i for i, piece in enumerate(token_bytes) if any(word in piece for word in self.words)}
        self.begin_with = cache(lambda rest: {i for i, piece in enumerate(token_bytes) if piece.startswith(rest)})

    def accept(self, token: int) -> None:
        text = self.tail + self.token_bytes[token]
        self.tail = text[max(len(text) - self.kept, 0) :]

    def banned(self) -> list[int]:
        """The tokens with which the answer would hold one of the words."""
        found = set(self.whole)
        for word in self.words:
            for n in range(1, len(word)):
                if self.tail.endswith(word[:n]):
                    found |= self.begin_with(word[n:])
        return list(found)
