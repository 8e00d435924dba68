"""Tokens to text as they come: whole characters only, and an end where a stop string begins; thinking told apart."""

OPEN, CLOSE = "<think>", "</think>"


class TextStream:
    """The text of a growing list of tokens, in pieces whose concatenation is the text of the whole list.

    A token of byte-level BPE may hold a part of a character; what it says is held back until the rest arrives. So is
    the end of the text where it could be the beginning of a stop string. Special tokens say nothing.
    """

    def __init__(self, tokenizer, stop: list[str] = ()):
        self.backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.stop = list(stop)
        self.before: list[int] = []  # the tokens before `window`: some vocabularies write a blank by what came before
        self.window: list[int] = []  # tokens since the text last ended with a whole character
        self.said = 0  # characters of the window's text that are in `held` or given out
        self.held = ""  # whole characters that may belong to a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that this token makes certain, "" where nothing is. After a stop string `stopped` is set."""
        self.window.append(token)
        text = self._window_text()
        # A replacement character at the end may be the first bytes of a character; any earlier one stays for good.
        certain = text[:-1] if text.endswith("\ufffd") else text
        self.held += certain[self.said :]
        self.said = max(self.said, len(certain))
        if len(certain) == len(text):
            self.before, self.window, self.said = self.window, [], 0
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back, once no token will follow: bytes that are no character become U+FFFD."""
        if self.stopped:
            return ""
        self.held += self._window_text()[self.said :]
        self.window, self.said = [], 0
        return self._release(final=True)

    def _window_text(self) -> str:
        if not self.before:
            return self._decode(self.window)
        return self._decode(self.before + self.window)[len(self._decode(self.before)) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens, skip_special_tokens=True)

    def _release(self, final: bool) -> str:
        """Gives out of `held` what cannot be part of a stop string any more."""
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop if s in self.held]
        if found:
            self.stopped = True
            piece, self.held = self.held[: min(found)[1]], ""  # the one complete first, however tokens cut the text
            return piece
        keep = 0 if final else max((overlap(self.held, s) for s in self.stop), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return piece


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def split_thinking(text: str, thinking: bool = False) -> tuple[str | None, str]:
    """A whole answer -> (what it thinks, what it says); None where it has no think block.

    thinking: the prompt has opened the block already. A block that never closes is all thought.
    """
    if not thinking and not text.lstrip().startswith(OPEN):
        return None, text
    thought, closed, said = text.lstrip().removeprefix(OPEN).partition(CLOSE)
    return thought.strip(), said.lstrip() if closed else ""


class ThinkingStream:
    """split_thinking for a text that comes in pieces, as (is it thought, text) pairs."""

    def __init__(self, thinking: bool = False):
        self.thinking, self.held, self.begun = thinking, "", thinking

    def feed(self, piece: str, final: bool = False) -> list[tuple[bool, str]]:
        """What is certain now; `final`: no piece will follow."""
        self.held += piece
        parts = []
        if not self.begun and self.held.lstrip().startswith(OPEN):
            self.begun = self.thinking = True
            self.held = self.held.lstrip().removeprefix(OPEN)
        elif not self.begun and (final or not OPEN.startswith(self.held.lstrip())):
            self.begun = True  # a block can only open an answer; tags later on are text
        if self.thinking and CLOSE in self.held:
            thought, _, self.held = self.held.partition(CLOSE)
            parts.append((True, thought))
            self.thinking = False
        if self.begun:
            keep = overlap(self.held, CLOSE) if self.thinking and not final else 0
            parts.append((self.thinking, self.held[: len(self.held) - keep]))
            self.held = self.held[len(self.held) - keep :]
        return [part for part in parts if part[1]]
