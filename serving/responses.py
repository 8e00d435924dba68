"""Answers in the forms of OpenAI's API, whole or as the events of a stream.

Every sample has a Choice. feed() takes a piece from the scheduler and returns what it adds to a stream. The Choice also
keeps the sum, which whole() returns for an answer in one body. So the two forms cannot differ.
"""

import json
import time
import uuid

from transformers.convert_slow_tokenizer import bytes_to_unicode

from inference.sampling import TokenLogprob
from inference.stream_text import AnswerReader, Piece, ToolCall

DONE = "data: [DONE]\n\n"


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Tokens:
    """Token ids as the API shows them: with text, and with bytes, since a token may be only a part of a character."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def bytes(self, token: int) -> bytes:
        # Byte-level BPE writes each byte as a printable character: "Ġ" is a blank. Here that is undone.
        name = self.tokenizer.convert_ids_to_tokens(token)
        if name is not None and all(character in self.byte_of for character in name):
            return bytes(self.byte_of[character] for character in name)
        return self.tokenizer.decode([token]).encode("utf-8")  # another kind of vocabulary, or an entry without a name

    def entry(self, token: int, logprob: float) -> dict:
        raw = self.bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    def chat(self, item: TokenLogprob) -> dict:
        top = [self.entry(token, logprob) for token, logprob in item.top]
        return self.entry(item.token, item.logprob) | {"top_logprobs": top}


class Choice:
    """What chats and completions share: how the answer ended, how many tokens it has, which of them are shown."""

    def __init__(self, index: int, tokens: Tokens, end_tokens: frozenset[int]):
        self.index, self.tokens, self.end_tokens = index, tokens, end_tokens
        self.finish_reason: str | None = None
        self.completion_tokens = 0

    def _count(self, piece: Piece) -> list[TokenLogprob] | None:
        """Counts a piece's tokens -> the log-probabilities to show: not that of the token that ends the turn."""
        self.completion_tokens += len(piece.token_ids)
        self.finish_reason = piece.finish_reason
        if piece.logprobs is None:
            return None
        return [item for item in piece.logprobs if not (piece.finish_reason and item.token in self.end_tokens)]


class ChatChoice(Choice):
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, index: int, tokens: Tokens, end_tokens: frozenset[int], reader: AnswerReader, begun: str = ""):
        """begun: the beginning of the answer that is part of the prompt, see begun_call()."""
        super().__init__(index, tokens, end_tokens)
        self.reader, self.begun = reader, begun
        self.content = self.reasoning = ""
        self.calls: list[dict] = []
        self.logprobs: list[dict] | None = None

    def opening(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def feed(self, piece: Piece) -> list[dict]:
        """A piece -> the choices of the chunks to send."""
        shown = self._count(piece)
        # The reader must see the beginning that stands in the prompt, once, or it would not know the call.
        text, self.begun = self.begun + piece.text, ""
        deltas = [self._add(kind, part) for kind, part in self.reader.feed(text, final=piece.finish_reason is not None)]
        logprobs = None
        if shown is not None:
            # A piece may mean several deltas, or none while text is held back; its log-probabilities go out once.
            entries = [self.tokens.chat(item) for item in shown]
            self.logprobs = (self.logprobs or []) + entries
            logprobs = {"content": entries, "refusal": None} if entries else None
            deltas = deltas or [{"content": ""}] * bool(entries)
        chunks = [self._chunk(delta, logprobs if i == 0 else None) for i, delta in enumerate(deltas)]
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
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


class TextChoice(Choice):
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, index: int, tokens: Tokens, end_tokens: frozenset[int]):
        super().__init__(index, tokens, end_tokens)
        self.text, self.offset = "", 0
        self.logprobs: dict[str, list] | None = None

    def opening(self) -> list[dict]:
        return []

    def feed(self, piece: Piece) -> list[dict]:
        shown = self._count(piece)
        self.text += piece.text
        logprobs = None
        if shown is not None:
            logprobs = self._logprobs(shown)
            so_far = self.logprobs or {name: [] for name in logprobs}
            self.logprobs = {name: so_far[name] + added for name, added in logprobs.items()}
        if piece.text or shown or piece.finish_reason:
            return [self._choice(piece.text, logprobs, piece.finish_reason)]
        return []

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, list]:
        """Four lists of equal length, as the older API has them."""
        result = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in items:
            entry = self.tokens.chat(item)
            result["tokens"].append(entry["token"])
            result["token_logprobs"].append(item.logprob)
            result["top_logprobs"].append({top["token"]: top["logprob"] for top in entry["top_logprobs"]})
            result["text_offset"].append(self.offset)
            self.offset += len(entry["token"])  # in characters of the text, where the token begins
        return result

    def _choice(self, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self) -> dict:
        return self._choice(self.text, self.logprobs, self.finish_reason)


class ApiResponse:
    """One response under one id. choices: the samples of the first prompt, then those of the second, and so on."""

    def __init__(self, model: str, choices: list[Choice], prompt_tokens: int):
        self.choices, self.prompt_tokens = choices, prompt_tokens
        self.kind = type(choices[0])
        self.head = {"id": f"{self.kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self) -> dict:
        completion = sum(choice.completion_tokens for choice in self.choices)
        total = self.prompt_tokens + completion
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": total}

    def whole(self) -> dict:
        choices = [choice.whole() for choice in self.choices]
        return self.head | {"object": self.kind.object, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: list[dict], include_usage: bool, last: bool = False) -> str:
        """One event. last: the one after all choices, which holds nothing but the usage."""
        body = self.head | {"object": self.kind.chunk_object, "choices": choices}
        return event(body | ({"usage": self.usage() if last else None} if include_usage else {}))
