"""What an answer's tags mean: thinking, tool calls and the rest told apart, while the text still comes in pieces.

<think>\\n...\\n</think>\\n\\nLet me see.\\n<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>
"""

import json
from dataclasses import dataclass

from inference.stream_text import ThinkingStream, overlap
from model.chat_template import to_json
from model.vocabulary import TAGS

OPEN, CLOSE = TAGS[4:6]  # <tool_call>, </tool_call>


@dataclass
class ToolCall:
    name: str
    arguments: str  # JSON text


def begun_call(name: str | None) -> str:
    """How an answer begins that must call a tool (this one, or any): put after the prompt, the model has to go on.

    It ends where a token ends in the texts the model has learned: no blank, no quotation mark that the next word takes.
    """
    return f'{OPEN}\n{{"name": {to_json(name)}, "arguments":' if name else f'{OPEN}\n{{"name":'


def parse_call(text: str, names: set[str]) -> ToolCall | None:
    """The call inside a tool_call block; None where it is none, or of a tool that was not offered."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        arguments_text = to_json(arguments)
        arguments_text.encode("utf-8")  # half a surrogate pair, written as an escape, cannot be sent
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments_text)


class AnswerReader:
    """Turns the pieces of an answer into parts: ("reasoning", text), ("content", text), ("call", ToolCall).

    thinking: the prompt has opened a think block. names: tools whose calls are told apart; none: no block is a call.
    one_call: what follows the first call is dropped. An answer without tags comes out letter for letter; around
    blocks, white space is dropped. A block that is no valid call, or never ends, stays text.
    """

    def __init__(self, thinking: bool = False, names: set[str] = frozenset(), one_call: bool = False):
        self.think = ThinkingStream(thinking)
        self.names, self.one_call = names, one_call
        self.called = False
        self.held = ""  # text that may turn out to be a block, or white space before one
        self.trim = False  # content begins after a block: its first white space is dropped
        self.thought, self.blank = False, ""  # of the thinking: whether it has begun, white space that may end it

    def feed(self, text: str, final: bool = False) -> list[tuple[str, str | ToolCall]]:
        parts = []
        for is_thought, piece in self.think.feed(text, final):
            parts += self._thought(piece) if is_thought else self._said(piece)
        return parts + (self._said("", final=True) if final else [])

    def _thought(self, piece: str):
        self.trim = True
        piece = self.blank + piece if self.thought else piece.lstrip()
        kept = piece.rstrip()
        self.blank = piece[len(kept) :]
        self.thought = self.thought or bool(kept)
        return [("reasoning", kept)] if kept else []

    def _said(self, piece: str, final: bool = False):
        self.held += piece
        if not self.names:
            return self._content(len(self.held))
        parts = []
        while OPEN in self.held:
            begin = self.held.index(OPEN)
            end = self.held.find(CLOSE, begin)
            if end < 0:
                break
            call = parse_call(self.held[begin + len(OPEN) : end], self.names)
            if call is None:
                parts += self._content(end + len(CLOSE))
                continue
            parts += self._content(len(self.held[:begin].rstrip()))
            if not (self.called and self.one_call):
                parts.append(("call", call))
            self.held = self.held[self.held.index(CLOSE) + len(CLOSE) :]
            self.called = self.trim = True
        if final:
            return parts + self._content(len(self.held.rstrip() if self.called else self.held))
        begin = self.held.find(OPEN)
        certain = self.held[: begin if begin >= 0 else len(self.held) - overlap(self.held, OPEN)]
        return parts + self._content(len(certain.rstrip()))

    def _content(self, length: int):
        """The first `length` characters of what is held, as content."""
        text, self.held = self.held[:length], self.held[length:]
        if self.trim:
            text = text.lstrip()
            self.trim = not text
        if self.called and self.one_call:
            return []
        return [("content", text)] if text else []
