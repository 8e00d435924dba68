"""From generated tokens to text while it is generated: whole characters, stop strings, thinking and tool calls.

  Sequence      one answer while it is generated: takes a token a step, returns a Piece
  TextStream    tokens -> text that later tokens cannot change
  AnswerReader  that text -> thinking, content and tool calls

An answer with both kinds of tags:

<think>\\n...\\n</think>\\n\\nLet me see.\\n<tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>
"""

import json
from dataclasses import dataclass, field

from inference.bad_words import BadWords
from inference.sampling import Sampler, SamplingParams, TokenLogprob
from model.chat_template import to_json

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


# ------------------------------------------------------------------------------------------------------- tokens to text
class TextStream:
    """The text of a growing list of tokens, in pieces. Joined they are the text of the whole list.

    A token of byte-level BPE may hold only some bytes of a character. It is held back until the rest has come. So is
    the end of the text while it could be the beginning of a stop string. Special tokens have no text.
    """

    def __init__(self, tokenizer, stop: list[str] = (), include_stop: bool = False):
        self.backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.stop, self.include_stop = list(stop), include_stop
        # Decoding all tokens at every step would cost n^2. Only the window is decoded, and before it the tokens of the
        # window before: some vocabularies write a blank, or none, by what came before.
        self.before: list[int] = []
        self.window: list[int] = []  # tokens since the text last ended with a whole character
        self.said = 0  # characters of the window's text that are in `held` or returned already
        self.held = ""  # whole characters that may belong to a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain with this token, perhaps "". After a stop string `stopped` is set."""
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
        """What was held back, when no token follows any more. Bytes that make no character become U+FFFD."""
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
        """Takes from `held` what cannot be part of a stop string any more."""
        found = [(self.held.find(s) + len(s), self.held.find(s)) for s in self.stop if s in self.held]
        if found:
            self.stopped = True
            # Of several stop strings the one that ends first: then the text does not depend on how tokens cut it.
            end, begin = min(found)
            piece, self.held = self.held[: end if self.include_stop else begin], ""
            return piece
        keep = 0 if final else max((overlap(self.held, s) for s in self.stop), default=0)
        piece, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return piece


# ----------------------------------------------------------------------------------------------------------- a sequence
@dataclass
class Piece:
    """What one step added to one sequence. `text` may be empty while a character or a stop string is incomplete."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # None while it goes on; "stop", "length" or "cancelled"
    index: int = 0  # which of the n samples
    prompt_logprobs: list[TokenLogprob] | None = None  # with the first piece, where they are asked for


@dataclass
class Completion:
    """One finished answer. token_ids and logprobs include the token that ended it, text does not."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop": end token or stop string; "length": max_tokens, the context or a limit
    # of the grammar's parser reached; "cancelled"
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[TokenLogprob] | None = None
    index: int = 0  # which of the n samples


@dataclass(eq=False)
class Sequence:
    """One answer while it is generated. `request` is the caller's own mark on it."""

    request: object
    index: int
    params: SamplingParams
    prompt: list[int]
    limit: int  # tokens it may generate
    end_tokens: frozenset[int]
    sampler: Sampler
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # one list, shared by the samples of a prompt
    text: str = ""
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Tokens it has in the cache: all but the newest, which the next step feeds in."""
        return len(self.prompt) + max(len(self.token_ids) - 1, 0)

    def accept(self, token: int, logprob: TokenLogprob | None) -> Piece:
        """Takes the next token -> the piece of text it adds."""
        of_prompt = self.prompt_logprobs if self.params.prompt_logprobs is not None and not self.token_ids else None
        if not self.limit:  # nothing but the prompt was to be read
            self.finish_reason = "length"
            return Piece("", [], None, "length", self.index, of_prompt)
        self.token_ids.append(token)
        self.sampler.accept(token)
        matcher = self.sampler.matcher
        ended = token in self.end_tokens or (matcher is not None and matcher.ended)
        # What ends the answer adds no text, even where it is an ordinary word (stop_token_ids).
        text = "" if ended and not self.params.include_stop else self.stream.feed(token)
        if ended or self.stream.stopped:
            self.finish_reason = "length" if matcher is not None and matcher.failed else "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        self.text += text
        if logprob is not None:
            self.logprobs.append(logprob)
        logprobs = None if logprob is None else [logprob]
        return Piece(text, [token], logprobs, self.finish_reason, self.index, of_prompt)

    def completion(self) -> Completion:
        """The finished answer; only after the end."""
        logprobs = self.logprobs if self.params.logprobs is not None else None
        return Completion(self.text, self.token_ids, self.finish_reason, len(self.prompt), len(self.token_ids),
                          logprobs, self.index)  # fmt: skip


def sequences(engine, prompt: list[int], params: SamplingParams, request: object = None) -> list[Sequence]:
    """The params.n samples of a prompt, ready to join a batch. engine: gives tokenizer, context and end tokens.

    Raises ValueError for a prompt that is empty or fills the context, for a parameter that names no token or no
    adapter, and for a grammar that cannot be held.
    """
    params.check_tokens(engine.vocab_size)
    engine.adapters.check(params.adapter)
    if not prompt:
        raise ValueError("the prompt is empty")
    room = engine.context - len(prompt)
    if room < (params.max_tokens != 0):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in the model's context of {engine.context}"
        )
    limit = room if params.max_tokens is None else min(params.max_tokens, room)
    # Each sample has its own place in the grammar, which is compiled once.
    matchers = [engine.grammars.matcher(params.grammar, prompt) if params.grammar else None for _ in range(params.n)]
    characters = engine.characters if params.whole_characters else None
    ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else engine.end_tokens)
    read: list[TokenLogprob] = []
    return [
        Sequence(
            request, i, params, prompt, limit, ends,
            Sampler(params, prompt, i, engine.vocab_size, matcher,
                    BadWords(params.bad_words, engine.token_bytes) if params.bad_words else None, characters),
            TextStream(engine.tokenizer, params.stop, params.include_stop), prompt_logprobs=read,
        )
        for i, matcher in enumerate(matchers)
    ]  # fmt: skip


def text_with_markers(tokenizer, completion: Completion) -> str:
    """All that was generated before the token that ended it, special tokens included: for checks of the form."""
    ended = completion.finish_reason == "stop"
    ids = completion.token_ids[:-1] if ended else completion.token_ids
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


# --------------------------------------------------------------------------------------------------- what the tags mean
def overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class ThinkingStream:
    """Tells thinking from what is said, in a text that comes in pieces, as (is it thought, text) pairs.

    thinking: the prompt has opened the block already. A block that never closes is all thought.
    """

    def __init__(self, thinking: bool = False):
        self.thinking, self.held, self.begun = thinking, "", thinking

    def feed(self, piece: str, final: bool = False) -> list[tuple[bool, str]]:
        """What is certain now. final: no piece follows."""
        self.held += piece
        parts = []
        # As long as the answer could still open with <think> (or is blank), nothing is certain.
        if not self.begun and self.held.lstrip().startswith(THINK):
            self.begun = self.thinking = True
            self.held = self.held.lstrip().removeprefix(THINK)
        elif not self.begun and (final or not THINK.startswith(self.held.lstrip())):
            self.begun = True  # a block can only open an answer; tags later on are text
        if self.thinking and THINK_END in self.held:
            thought, _, self.held = self.held.partition(THINK_END)
            parts.append((True, thought))
            self.thinking = False
        if self.begun:
            # The last characters of a thought may be the first of </think>.
            keep = overlap(self.held, THINK_END) if self.thinking and not final else 0
            parts.append((self.thinking, self.held[: len(self.held) - keep]))
            self.held = self.held[len(self.held) - keep :]
        return [part for part in parts if part[1]]


@dataclass
class ToolCall:
    name: str
    arguments: str  # JSON text


def parse_call(text: str, names: set[str]) -> ToolCall | None:
    """The call inside a tool_call block; None where it is no valid call, or one of a tool that was not offered."""
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments") or {}
        # Models write arguments as an object or as a string that holds one.
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

    thinking: the prompt has opened a think block. names: the tools offered; with none no block is a call.
    one_call: what follows the first call is dropped. one_line: a grammar keeps each call on a line of its own.

    An answer without tags comes out letter for letter. White space around blocks is dropped. A block that is no valid
    call, or that never ends, stays text.
    """

    def __init__(
        self, thinking: bool = False, names: set[str] = frozenset(), one_call: bool = False, one_line: bool = False
    ):
        self.think = ThinkingStream(thinking)
        self.names, self.one_call = names, one_call
        # In a call of one line a "</tool_call>" may stand inside a string, but none after a line end.
        self.call_end = "\n" + CALL_END if one_line else CALL_END
        self.called = False
        self.held = ""  # text that may turn out to be a block, or white space before one
        self.trim = False  # a block has just ended: white space at the beginning of what follows is dropped
        self.thought = False  # whether the thinking has had a first word
        self.blank = ""  # white space of the thinking that is dropped if nothing follows

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
        # First the blocks that are complete,
        while CALL in self.held:
            begin = self.held.index(CALL)
            end = self.held.find(self.call_end, begin)
            if end < 0:
                break
            call = parse_call(self.held[begin + len(CALL) : end], self.names)
            if call is None:  # it stays text, tags and all
                parts += self._content(end + len(self.call_end))
                continue
            parts += self._content(len(self.held[:begin].rstrip()))
            if not (self.called and self.one_call):
                parts.append(("call", call))
            self.held = self.held[self.held.index(self.call_end) + len(self.call_end) :]
            self.called = self.trim = True
        # then the rest: at the end all of it, before the end what cannot belong to a block. White space waits, because
        # it is dropped if a block follows.
        if final:
            return parts + self._content(len(self.held.rstrip() if self.called else self.held))
        begin = self.held.find(CALL)
        certain = self.held[: begin if begin >= 0 else len(self.held) - overlap(self.held, CALL)]
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
