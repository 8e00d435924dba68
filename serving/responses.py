"""Answers in the forms of OpenAI's API, whole or as the events of a stream.

Every sample has a Choice. feed() takes a piece from the scheduler and returns what it adds to a stream. The Choice also
keeps the sum, which whole() returns for an answer in one body. So the two forms cannot differ.
"""

import json
import time
import uuid
from dataclasses import dataclass, replace

from inference.sampling import TokenLogprob
from inference.stream_text import AnswerReader, Piece, ToolCall
from model.vocabulary import spelled_bytes
from serving.errors import ApiError

DONE = "data: [DONE]\n\n"


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Tokens:
    """Token ids as the API shows them: with text, and with bytes, since a token may be only a part of a character."""

    def __init__(self, tokenizer, text_bytes: list[bytes]):
        """text_bytes: what each entry adds to a text, see Engine.token_bytes."""
        self.tokenizer, self.text_bytes = tokenizer, text_bytes

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def entry(self, token: int, logprob: float) -> dict:
        raw = spelled_bytes(self.tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def chat(self, item: TokenLogprob) -> dict:
        top = [self.entry(token, logprob) for token, logprob in item.top]
        return self.entry(item.token, item.logprob) | {"top_logprobs": top}

    def older(self, token: int) -> str:
        """As the API for completions names a token: a part of a character as bytes:\\xe5\\xa5."""
        raw = spelled_bytes(self.tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def of_prompt(self, read: list[TokenLogprob], wanted: int) -> list[dict | None]:
        """vLLM's prompt_logprobs: for each token but the first, which nothing predicts, {id: entry}."""
        result: list[dict | None] = [None]
        for item in read:
            best = {token: (logprob, rank) for rank, (token, logprob) in enumerate(item.top[:wanted], 1)}
            shown = {item.token: (item.logprob, item.rank)} | best
            result.append({
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": self.older(token)}
                for token, (logprob, rank) in shown.items()
            })  # fmt: skip
        return result


@dataclass
class Shown:
    """What a response shows besides the answer.

    echo: the prompt stands before the answer, and with `logprobs` (best tokens at each place) its log-probabilities.
    prompt_logprobs: so many best tokens at each of its places, apart; None: nothing.
    """

    token_ids: bool = False
    prompt_logprobs: int | None = None
    echo: bool = False
    logprobs: int | None = None


class Choice:
    """What chats and completions share: how the answer ended, how many tokens it has, which of them are shown."""

    def __init__(
        self, index: int, tokens: Tokens, end_tokens: frozenset[int], prompt: list[int] = (), shown: Shown | None = None
    ):
        self.index, self.tokens, self.end_tokens = index, tokens, end_tokens
        self.prompt, self.shown = list(prompt), shown or Shown()
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.token_ids: list[int] = []
        self.prompt_read: list[TokenLogprob] | None = None

    def _count(self, piece: Piece) -> list[TokenLogprob] | None:
        """Counts a piece's tokens -> the log-probabilities to show: not that of the token that ends the turn."""
        self.completion_tokens += len(piece.token_ids)
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason
        if piece.prompt_logprobs is not None:
            self.prompt_read = piece.prompt_logprobs
        if piece.logprobs is None:
            return None
        # Programs that score prompts (echo) drop the last entry, whatever it is: there the end token must be shown.
        hidden = frozenset() if self.shown.echo else self.end_tokens
        return [item for item in piece.logprobs if not (piece.finish_reason and item.token in hidden)]

    def ids(self, token_ids: list[int]) -> dict:
        return {"token_ids": token_ids} if self.shown.token_ids else {}

    def about_prompt(self) -> dict:
        """What the response shows of the prompt."""
        shown = {"prompt_token_ids": self.prompt} if self.shown.token_ids else {}
        if self.shown.prompt_logprobs is not None:
            shown["prompt_logprobs"] = self.tokens.of_prompt(self.prompt_read, self.shown.prompt_logprobs)
        return shown


class ChatChoice(Choice):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, tokens: Tokens, end_tokens: frozenset[int], reader: AnswerReader, *shown):
        super().__init__(index, tokens, end_tokens, *shown)
        self.reader = reader
        self.content = self.reasoning = ""
        self.calls: list[dict] = []
        self.logprobs: list[dict] | None = None

    def opening(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def feed(self, piece: Piece) -> list[dict]:
        """A piece -> the choices of the chunks to send."""
        shown = self._count(piece)
        deltas = [self._add(kind, part) for kind, part in self.reader.feed(piece.text, piece.finish_reason is not None)]
        logprobs = None
        if shown is not None:
            # A piece may mean several deltas, or none while text is held back; its log-probabilities go out once.
            entries = [self.tokens.chat(item) for item in shown]
            self.logprobs = (self.logprobs or []) + entries
            logprobs = {"content": entries, "refusal": None} if entries else None
            deltas = deltas or [{"content": ""}] * bool(entries)
        ids = self.ids(piece.token_ids)
        deltas = deltas or [{"content": ""}] * bool(ids)
        chunks = [self._chunk(delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
        chunks = [chunks[0] | ids, *chunks[1:]] if chunks else []
        if piece.finish_reason:
            # "length" stays: a client must know that the last call may be cut off.
            if self.calls and piece.finish_reason == "stop":
                self.finish_reason = "tool_calls"
            chunks.append(self._chunk({}, finish_reason=self.finish_reason))
        return chunks

    def _add(self, kind: str, part: str | ToolCall) -> dict:
        if kind == "content":
            self.content += part
            return {"content": part}
        if kind == "reasoning":
            self.reasoning += part
            return {"reasoning_content": part}
        function = {"name": part.name, "arguments": part.arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self.calls.append(call)
        return {"tool_calls": [{"index": len(self.calls) - 1} | call]}

    def _chunk(self, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self) -> dict:
        content = self.content if self.content or not self.calls else None  # as OpenAI's API has it beside calls
        message = {"role": "assistant", "content": content, "refusal": None}
        message |= {"reasoning_content": self.reasoning} if self.reasoning else {}
        message |= {"tool_calls": self.calls} if self.calls else {}
        logprobs = None if self.logprobs is None else {"content": self.logprobs, "refusal": None}
        choice = {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}
        return choice | self.ids(self.token_ids)


class TextChoice(Choice):
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *args):
        super().__init__(*args)
        self.text, self.characters = "", 0
        self.echoed = not self.shown.echo
        self.logprobs: dict[str, list] | None = None

    def opening(self) -> list[dict]:
        return []

    def feed(self, piece: Piece) -> list[dict]:
        first = not self.token_ids
        shown, text = self._count(piece), piece.text
        if not self.echoed:  # the prompt stands before the first piece
            self.echoed, text = True, self.tokens.text(self.prompt) + text
            if (n := self.shown.logprobs) is not None:
                read = [replace(item, top=item.top[:n]) for item in self.prompt_read]
                shown = [TokenLogprob(self.prompt[0], None, []), *read, *(shown or [])]
        self.text += text
        logprobs = None
        if shown is not None:
            logprobs = self._logprobs(shown)
            so_far = self.logprobs or {name: [] for name in logprobs}
            self.logprobs = {name: so_far[name] + added for name, added in logprobs.items()}
        if text or shown or piece.finish_reason or self.shown.token_ids:
            choice = self._choice(text, logprobs, piece.finish_reason) | self.ids(piece.token_ids)
            return [choice | (self.about_prompt() if first else {})]
        return []

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, list]:
        """Four lists of equal length, as the older API has them. Nothing predicts the first token of a prompt: null."""
        result = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in items:
            best = {self.tokens.older(token): logprob for token, logprob in item.top}
            result["tokens"].append(self.tokens.older(item.token))
            result["token_logprobs"].append(item.logprob)
            result["top_logprobs"].append(None if item.logprob is None else best)
            result["text_offset"].append(self._offset(self.tokens.text_bytes[item.token]))
        return result

    def _offset(self, raw: bytes) -> int:
        """The character of the text in which a token's first byte stands; markers have no bytes there."""
        begins = [byte & 0xC0 != 0x80 for byte in raw]  # the other bytes of UTF-8 belong to a character that has begun
        offset = self.characters - (1 if begins and not begins[0] and self.characters else 0)
        self.characters += sum(begins)
        return offset

    def _choice(self, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self) -> dict:
        choice = self._choice(self.text, self.logprobs, self.finish_reason)
        return choice | self.ids(self.token_ids) | self.about_prompt()


class ApiResponse:
    """One response under one id. choices: the samples of the first prompt, then those of the second, and so on."""

    def __init__(self, model: str, choices: list[Choice], prompt_tokens: int, include_usage: bool = False):
        self.choices, self.prompt_tokens, self.include_usage = choices, prompt_tokens, include_usage
        self.kind = type(choices[0])
        self.head = {"id": f"{self.kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict:
        completion = sum(choice.completion_tokens for choice in self.choices)
        total = self.prompt_tokens + completion
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": total}

    def whole(self) -> dict:
        choices = [choice.whole() for choice in self.choices]
        body = self.head | {"object": self.kind.object, "choices": choices, "usage": self.usage()}
        return body | (self.choices[0].about_prompt() if self.kind is ChatChoice else {})

    # What a stream consists of. Each body is sent as a line of its own, and after the last one comes last_line.
    line, last_line = staticmethod(event), DONE

    def opening(self) -> list[dict]:
        """Before the first piece: a choice of a chat names its role, and clients wait for that."""
        return [
            self._chunk([part], about=choice.about_prompt()) for choice in self.choices for part in choice.opening()
        ]

    def feed(self, i: int, piece: Piece) -> list[dict]:
        """A piece of choice i -> the bodies that it makes."""
        return [self._chunk([part]) for part in self.choices[i].feed(piece)]

    def closing(self) -> list[dict]:
        return [self._chunk([], last=True)] if self.include_usage else []

    def failed(self, refusal: ApiError) -> list[dict]:
        return [refusal.body()]

    def _chunk(self, choices: list[dict], last: bool = False, about: dict | None = None) -> dict:
        """last: the one after all choices, which holds nothing but the usage. about: of the prompt."""
        body = self.head | {"object": self.kind.chunk_object, "choices": choices} | (about or {})
        return body | ({"usage": self.usage() if last else None} if self.include_usage else {})
