"""The fields of a request. A field is followed, or refused in words, or ignored because it does not change the answer.

Names and bounds are those of OpenAI's API (platform.openai.com/docs/api-reference), with the additions of vLLM and
MiniMind: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, chat_template_kwargs, open_thinking,
reasoning_content. fail_fast: of a million wrong items in a list only the first one is reported.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from inference.sampling import SamplingParams


def not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for what fits into the context")
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]
MaxTokens = Annotated[int, Field(ge=-1), AfterValidator(not_zero)]  # -1 or absent: what fits into the context
WITHOUT_GRAMMAR = "this server does not constrain what the model writes"


class Loose(BaseModel):
    """Unknown fields are accepted: clients send many that concern other servers (user, metadata, store, ...)."""

    model_config = ConfigDict(extra="allow")


# ------------------------------------------------------------------------------------------------------ conversations
class Part(Loose):
    type: str = "text"
    text: str | None = None

    @model_validator(mode="after")
    def only_text(self):
        if self.type != "text" or self.text is None:
            raise ValueError(f"a part of type {self.type!r} cannot be read; the model reads text only")
        return self


class CalledFunction(Loose):
    name: str
    arguments: str | dict[str, Any] = ""


class Call(Loose):
    function: CalledFunction


class Message(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None

    def plain(self) -> dict:
        """As model.tokenizer.render takes it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        result = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.role == "assistant" and self.reasoning_content:
            result["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            result["tool_calls"] = [call.function.model_dump(include={"name", "arguments"}) for call in self.tool_calls]
        return result


class Function(Loose):
    name: str = Field(min_length=1, max_length=128)


class Tool(Loose):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class ResponseFormat(Loose):
    type: str = "text"

    @field_validator("type")
    @classmethod
    def only_text(cls, value):
        if value != "text":
            raise ValueError(f"{value!r} is not supported: {WITHOUT_GRAMMAR}; ask for JSON in the prompt")
        return value


class StreamOptions(Loose):
    include_usage: bool | None = None


class TemplateArguments(BaseModel):
    """Two names of one switch: enable_thinking is Qwen3's, open_thinking MiniMind's."""

    model_config = ConfigDict(extra="forbid")
    enable_thinking: bool | None = None
    open_thinking: bool | None = None


# ----------------------------------------------------------------------------------------------------------- requests
class Sampling(Loose):
    """What chats and completions have in common. null means that the field is absent."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[
        Annotated[Number, Field(ge=0.01, le=100)] | None,
        Field(validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")),  # llama.cpp's and Open-WebUI's
    ] = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=100)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: MaxTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, logprobs: int | None, wanted_tokens: int | None, most_tokens: int | None, defaults: dict):
        """-> SamplingParams.

        wanted_tokens: the request's max_tokens; most_tokens: the server's limit; None: what fits into the context.
        defaults: the server's, for fields that the request leaves out.
        """
        limits = [n for n in (wanted_tokens if wanted_tokens != -1 else None, most_tokens) if n is not None]
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "logit_bias", "seed", "stop_token_ids", "n", "ignore_eos",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        chosen = defaults | given
        if chosen.get("temperature", 1) < 1e-4:
            chosen["temperature"] = 0  # dividing logits by so little overflows, and the best token is certain anyway
        chosen["top_k"] = max(chosen.get("top_k", 0), 0)  # -1 means all in some clients
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop = [text for text in stop if text]  # clients send [""] for an empty input field
        return SamplingParams(max_tokens=min(limits, default=None), stop=stop, logprobs=logprobs, **chosen)


GRAMMARS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "structured_outputs")
REFUSED = dict.fromkeys(GRAMMARS, WITHOUT_GRAMMAR) | {
    "min_tokens": "an answer may end where it likes; ignore_eos makes it go on to max_tokens",
}  # fmt: skip
REFUSED_IN_CHATS = REFUSED | {
    "functions": "use tools", "function_call": "use tool_choice", "audio": "the model speaks text only",
    "web_search_options": "there is no search here", "prediction": "every token is generated",
}  # fmt: skip
REFUSED_IN_COMPLETIONS = REFUSED | {
    "suffix": "the model only continues text", "echo": "put the prompt before the answer yourself",
    "tools": "use /v1/chat/completions", "max_completion_tokens": "use max_tokens",
}  # fmt: skip


def refuse(request: Loose, refused: dict[str, str]) -> None:
    """Raises ValueError where a field is set that would change the answer and cannot be followed."""
    for name, reason in refused.items():
        if (request.model_extra or {}).get(name) not in (None, False, [], {}, ""):
            raise ValueError(f"{name} is not supported: {reason}")


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(fail_fast=True), Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True), Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    chat_template_kwargs: TemplateArguments | None = None
    open_thinking: bool | None = None

    @model_validator(mode="after")
    def consistent(self):
        refuse(self, REFUSED_IN_CHATS)
        if self.modalities and self.modalities != ["text"]:
            raise ValueError("modalities: the model speaks text only")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")
        return self

    @property
    def thinking(self) -> bool | None:
        """Whether the prompt opens a think block; None: as the model likes."""
        kwargs = self.chat_template_kwargs or TemplateArguments()
        wishes = (kwargs.enable_thinking, kwargs.open_thinking, self.open_thinking)
        return next((wish for wish in wishes if wish is not None), None)

    def sampling_params(self, most_tokens: int | None, defaults: dict) -> SamplingParams:
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.params((self.top_logprobs or 0) if self.logprobs else None, wanted, most_tokens, defaults)


Token = Annotated[int, Field(ge=0)]


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True), Field(min_length=1)]
        | Annotated[list[Token], Field(fail_fast=True), Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Token], Field(fail_fast=True), Field(min_length=1)]],
            Field(fail_fast=True),
            Field(min_length=1),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def consistent(self):
        refuse(self, REFUSED_IN_COMPLETIONS)
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported: ask for n answers and choose")
        return self

    @property
    def prompts(self) -> list:
        """The prompts, each a text or a list of token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt

    def sampling_params(self, most_tokens: int | None, defaults: dict) -> SamplingParams:
        return self.params(self.logprobs, self.max_tokens, most_tokens, defaults)
