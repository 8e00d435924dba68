"""Where the page and the terminal get their answers: from a model in this process, or from one behind an API.

A source streams an answer as parts: ("reasoning", text), ("content", text), and ("call", ToolCall) for each tool call
once it is complete. To stop iterating is to stop the generation.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from inference.grammar import Grammar
from inference.sampling import SamplingParams
from inference.stream_text import AnswerReader, ToolCall

BROKEN = "\ufffd"
NOT_THE_API = "{} does not answer as OpenAI's API does; does it end in /v1?"


@dataclass(frozen=True)
class Settings:
    """What is asked for. thinking: True opens a think block, False an empty one, None leaves it to the model.

    max_tokens, temperature and top_p may be None for a Remote: what its server takes by default.
    """

    system: str = ""
    history: int = 4  # earlier exchanges the model sees
    thinking: bool | None = None
    tools: tuple[dict, ...] = ()
    max_tokens: int | None = 512
    temperature: float | None = 0.85
    top_p: float | None = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    form: Grammar | None = None  # what the answer must match; see forms.py

    @property
    def tool_names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.tools}


@dataclass
class Usage:
    """Filled in while an answer comes.

    read, written   tokens of the prompt and of the answer; None where a server does not tell
    ended           "stop": the model ended it; "length": it was cut; "" while it goes on
    broken          places where the answer's bytes made no character, which are left out of its text
    """

    read: int | None = None
    written: int | None = None
    ended: str = ""
    broken: int = 0
    times: list[float] = field(default_factory=list)  # when the first and the last piece came, seconds

    def arrived(self) -> None:
        self.times = [*self.times[:1], time.perf_counter()]

    @property
    def per_second(self) -> float | None:
        """Tokens a second after the first one, for which the prompt had to be read; None where that is not known."""
        if not self.written or self.written < 2 or len(self.times) < 2 or self.times[1] <= self.times[0]:
            return None
        return (self.written - 1) / (self.times[1] - self.times[0])

    def whole(self, text: str) -> str:
        """The text without U+FFFD, which stands where bytes made no character."""
        self.broken += text.count(BROKEN)
        return text.replace(BROKEN, "")


def visible(messages: list[dict], settings: Settings) -> list[dict]:
    """The messages that a model is sent: the system message and the last exchanges, without thinking.

    An exchange begins with a user's message and goes on to the next one.
    """
    begins = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = begins[-settings.history - 1] if len(begins) > settings.history else 0
    keys = ("role", "content", "tool_calls", "tool_call_id")  # what else the page keeps in a message is its own
    kept = [{key: message[key] for key in keys if key in message} for message in messages[first:]]
    return [{"role": "system", "content": settings.system}] * bool(settings.system) + kept


def exported(messages: list[dict], system: str = "") -> str:
    """A chat as one row that 3-full_sft.py can learn from, indented so that it can be read."""
    keys = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
    rows = [{key: message[key] for key in keys if key in message} for message in messages]
    head = [{"role": "system", "content": system}] * bool(system)
    return json.dumps({"conversations": head + rows}, ensure_ascii=False, indent=1)


def as_message(call: ToolCall) -> dict:
    """A tool call as OpenAI's API writes it in a message."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:12]}", "type": "function", "function": function}


Parts = Iterator[tuple[str, str | ToolCall]]


# ----------------------------------------------------------------------------------------------------------- sources
class Local:
    """A model in this process."""

    def __init__(self, engine):
        self.engine = engine

    def stream(self, messages: list[dict], settings: Settings, usage: Usage | None = None) -> Parts:
        """Raises ValueError where not even the last exchange fits into the context."""
        reader = AnswerReader(settings.thinking is True, settings.tool_names)
        for text, final in self._written(self.prompt(messages, settings), settings, usage or Usage()):
            yield from reader.feed(text, final=final)

    def continued(self, text: str, settings: Settings, usage: Usage | None = None) -> Iterator[str]:
        """How the model goes on with a text, as a base model does, in pieces. Raises ValueError where it is too
        long."""
        for piece, _ in self._written(self.engine.encode(text), settings, usage or Usage()):
            yield piece

    def _written(self, ids: list[int], settings: Settings, usage: Usage) -> Iterator[tuple[str, bool]]:
        """(text, whether it is the last) of each token after the prompt `ids`."""
        params = SamplingParams(
            max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p,
            top_k=settings.top_k, repetition_penalty=settings.repetition_penalty, seed=settings.seed,
            grammar=settings.form, whole_characters=True,
        )  # fmt: skip
        usage.read, usage.written = len(ids), 0
        for piece in self.engine.stream(ids, params):
            usage.arrived()
            usage.written += len(piece.token_ids)
            usage.ended = piece.finish_reason or ""
            yield usage.whole(piece.text), piece.finish_reason is not None

    def prompt(self, messages: list[dict], settings: Settings) -> list[int]:
        """Token ids, with as many of the earlier exchanges as leave room for an answer of max_tokens."""
        for history in range(settings.history, -1, -1):
            sent = visible(messages, Settings(settings.system, history))
            ids = self.engine.encode(sent, list(settings.tools), settings.thinking)
            if len(ids) + settings.max_tokens <= self.engine.context:
                break
        return ids


class Refused(ValueError):
    """The server is there and says no: too busy, a chat too long, a wrong key."""


class Remote:
    """A model behind any server that speaks OpenAI's chat API. timeout: seconds, for an answer."""

    def __init__(self, address: str, key: str, model: str = "", timeout: float = 600.0):
        try:
            import httpx2  # what OpenAI's client sends through; where an answer breaks off, the error is httpx2's
            import openai
        except ImportError:
            raise ValueError("an API address needs OpenAI's client: pip install openai") from None
        self.no_answer = (openai.APIConnectionError, httpx2.HTTPError, httpx2.InvalidURL)
        self.refusal = openai.APIError
        self.address, self.model = address, model
        with self.asking():
            # No retries: whoever sits before it is told at once and can ask again.
            self.client = openai.OpenAI(base_url=address, api_key=key or "none", timeout=timeout, max_retries=0)

    @contextlib.contextmanager
    def asking(self):
        """What goes wrong between here and the server becomes a ValueError with one line, a refusal a Refused."""
        try:
            yield
        except self.no_answer as error:  # first: to the client an APIConnectionError is an APIError as well
            said = str(error.__cause__ or error).strip() or type(error).__name__
            raise ValueError(f"cannot reach {self.address}: {said.splitlines()[0]}") from None
        except self.refusal as error:
            raise Refused(f"{self.address} refuses: {error.message.splitlines()[0]}") from None
        except (AttributeError, json.JSONDecodeError):  # OpenAI's client takes any reply for one of the API
            raise ValueError(NOT_THE_API.format(self.address)) from None

    def models(self) -> list[str]:
        with self.asking():
            return [model.id for model in self.client.with_options(timeout=10).models.list()]

    def stream(self, messages: list[dict], settings: Settings, usage: Usage | None = None) -> Parts:
        usage = usage or Usage()
        reader = AnswerReader(names=settings.tool_names)  # for servers that leave the tags in the text
        calls: dict[int, list[str]] = {}  # index -> name and arguments, which come in pieces
        choice = None  # stays None where no chunk ever comes
        with self.asking(), self.client.chat.completions.create(**self.request(messages, settings)) as chunks:
            for choice in (each for chunk in counted(chunks, usage) for each in chunk.choices):
                thought = getattr(choice.delta, "reasoning_content", None)  # not a field of OpenAI's own API
                if thought:
                    yield "reasoning", usage.whole(thought)
                usage.ended = choice.finish_reason or usage.ended
                yield from reader.feed(usage.whole(choice.delta.content or ""))
                for part in choice.delta.tool_calls or []:
                    call = calls.setdefault(part.index, ["", ""])
                    for i, text in enumerate((part.function.name, part.function.arguments)):
                        call[i] += text or ""
        if choice is None:
            raise ValueError(NOT_THE_API.format(self.address))
        yield from reader.feed("", final=True)
        yield from (("call", ToolCall(name, arguments)) for name, arguments in calls.values())

    def request(self, messages: list[dict], settings: Settings) -> dict:
        """Fields that OpenAI's API does not have are sent only where they are set: some servers refuse them."""
        request = {"model": self.model, "messages": visible(messages, settings), "stream": True}
        request["stream_options"] = {"include_usage": True}
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            if getattr(settings, name) is not None:
                request[name] = getattr(settings, name)
        extra = {}
        if settings.top_k:
            extra["top_k"] = settings.top_k
        if settings.repetition_penalty != 1:
            extra["repetition_penalty"] = settings.repetition_penalty
        if settings.form is not None and settings.form.kind == "choice":  # vLLM's name for it, and our server's
            extra["structured_outputs"] = {"choice": json.loads(settings.form.text)}
        elif settings.form is not None:
            schema = {"name": "answer", "schema": json.loads(settings.form.text)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        if settings.thinking is not None:
            # Qwen3's name for the switch, and MiniMind's, which exported models have.
            extra["chat_template_kwargs"] = {"enable_thinking": settings.thinking, "open_thinking": settings.thinking}
        if settings.tools:
            request["tools"] = list(settings.tools)
        return request | {"extra_body": extra}


def counted(chunks, usage: Usage):
    """The chunks of an answer. The last one, which has no text, tells how many tokens were read and written."""
    for chunk in chunks:
        if chunk.choices:
            usage.arrived()
        if chunk.usage:
            usage.read, usage.written = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        yield chunk
