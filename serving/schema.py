"""The fields of a request. A field is followed, or refused in words, or ignored because it does not change the answer.

Names and bounds are those of OpenAI's API (platform.openai.com/docs/api-reference), with the additions of vLLM and
MiniMind: top_k, min_p, repetition_penalty, stop_token_ids, ignore_eos, chat_template_kwargs, open_thinking,
reasoning_content. fail_fast: of a million wrong items in a list only the first one is reported.
serving/conversations.py holds messages and tools, serving/forms.py what form an answer must have.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, model_validator

from inference.sampling import SamplingParams
from serving.conversations import AllowedTools, Message, NamedTool, Tool
from serving.forms import Formed, Loose


def not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for what fits into the context")
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000)]
Token = Annotated[int, Field(ge=0)]
MaxTokens = Annotated[int, Field(ge=-1), AfterValidator(not_zero)]  # -1 or absent: what fits into the context


class StreamOptions(Loose):
    include_usage: bool | None = None


class TemplateArguments(BaseModel):
    """Two names of one switch: enable_thinking is Qwen3's, open_thinking MiniMind's."""

    model_config = ConfigDict(extra="forbid")
    enable_thinking: bool | None = None
    open_thinking: bool | None = None


# ----------------------------------------------------------------------------------------------------------- requests
class Sampling(Formed):
    """What chats and completions have in common. null means that the field is absent."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None  # 0: the best token
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[
        Annotated[Number, Field(ge=0.01, le=100)] | None,
        Field(validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")),  # llama.cpp's and Open-WebUI's
    ] = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # -1, as absent: a new one each time
    stop: Text | list[Text] | None = None
    include_stop_str_in_output: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=100)] | None = None
    allowed_token_ids: Annotated[list[Token], Field(fail_fast=True, min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=100)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1), AfterValidator(not_zero)] | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[
        MaxTokens | None, Field(validation_alias=AliasChoices("max_tokens", "n_predict"))  # llama.cpp's
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of the answer at most; None: what fits into the context."""
        return None if self.max_tokens == -1 else self.max_tokens

    def params(self, logprobs: int | None, prompt_logprobs: int | None, most_tokens: int | None, defaults: dict):
        """-> SamplingParams.

        most_tokens: the server's limit; None: what fits into the context. defaults: the server's, for fields that the
        request leaves out.
        """
        limits = [n for n in (self.wanted_tokens, most_tokens) if n is not None]
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "logit_bias", "seed", "stop_token_ids", "allowed_token_ids", "bad_words", "n", "ignore_eos",
        )  # fmt: skip
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        chosen = defaults | given
        if chosen.get("seed") == -1:
            del chosen["seed"]
        if chosen.get("top_p") == 0:  # the fewest tokens there can be: the best one
            chosen |= {"top_p": 1.0, "temperature": 0}
        if chosen.get("temperature", 1) < 1e-4:
            chosen["temperature"] = 0  # dividing logits by so little overflows, and the best token is certain anyway
        chosen["top_k"] = max(chosen.get("top_k", 0), 0)  # -1 means all in some clients
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop = [text for text in stop if text]  # clients send [""] for an empty input field
        return SamplingParams(
            max_tokens=min(limits, default=None), stop=stop, include_stop=bool(self.include_stop_str_in_output),
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, **chosen,
        )  # fmt: skip

    @model_validator(mode="after")
    def one_piece(self):
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs comes with whole answers only: leave stream out")
        return self


REFUSED = {
    "guided_whitespace_pattern": 'JSON is written with ", " and ": " and no other white space',
    "min_tokens": "an answer may end where it likes; ignore_eos makes it go on to max_tokens",
    "use_beam_search": "tokens are drawn one after the other; n gives several answers",
    "prompt_embeds": "prompts are texts or token ids",
    "chat_template": "chats are written as the model has learned them",
    "logits_processors": "logit_bias, bad_words and allowed_token_ids are there",
    "documents": "put them into a message",
}  # fmt: skip
REFUSED_IN_CHATS = REFUSED | {
    "functions": "use tools", "function_call": "use tool_choice", "audio": "the model speaks text only",
    "web_search_options": "there is no search here", "prediction": "every token is generated",
}  # fmt: skip
REFUSED_IN_COMPLETIONS = REFUSED | {
    "suffix": "the model only continues text",
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
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True), Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
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
        self._check_continuation()
        names = [tool.function.name for tool in self.tools or []]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        for name in self.chosen_names:
            if name not in names:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
        return self

    def _check_continuation(self) -> None:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt: false; an answer begins once")
        if self.continue_final_message and not self._can_be_continued:
            raise ValueError("continue_final_message needs a last message of the assistant, without tool calls")
        if self.add_generation_prompt is False and not self.continued:
            raise ValueError("add_generation_prompt: false is for a last message of the assistant that is continued")
        if self.continued and self.asked_form():
            raise ValueError("an answer that goes on with the assistant's last message cannot be held to a form")

    @property
    def _can_be_continued(self) -> bool:
        last = self.messages[-1]
        return last.role == "assistant" and not last.tool_calls

    @property
    def continued(self) -> bool:
        """Whether the last message is the beginning of the answer: one of the assistant is, if nothing else is said."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        return self._can_be_continued and not (self.add_generation_prompt or self.asked_form() or self.must_call)

    @property
    def chosen_names(self) -> list[str]:
        """The functions that tool_choice names."""
        choice = self.tool_choice
        chosen = choice.allowed_tools.tools if isinstance(choice, AllowedTools) else [choice]
        return [tool.function.name for tool in chosen if isinstance(tool, NamedTool)]

    @property
    def offered(self) -> list[Tool]:
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in self.tools if tool.function.name in self.chosen_names]
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        if isinstance(self.tool_choice, AllowedTools):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice not in (None, "none", "auto")

    @property
    def thinks_already(self) -> bool:
        """Whether the message that is continued has opened a think block and not closed it."""
        text = self.messages[-1].plain()["content"] if self.continued else ""
        return "<think>" in text and "</think>" not in text

    @property
    def wanted_tokens(self) -> int | None:
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return None if wanted == -1 else wanted

    @property
    def thinking(self) -> bool | None:
        """Whether the prompt opens a think block; None: as the model likes."""
        kwargs = self.chat_template_kwargs or TemplateArguments()
        wishes = (kwargs.enable_thinking, kwargs.open_thinking, self.open_thinking)
        return next((wish for wish in wishes if wish is not None), None)

    def sampling_params(self, most_tokens: int | None, defaults: dict) -> SamplingParams:
        return self.params((self.top_logprobs or 0) if self.logprobs else None, self.prompt_logprobs, most_tokens,
                           defaults)  # fmt: skip


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
    echo: bool | None = None  # the prompt, and its log-probabilities, before the answer
    max_tokens: Annotated[
        Annotated[int, Field(ge=-1)] | None, Field(validation_alias=AliasChoices("max_tokens", "n_predict"))
    ] = None  # 0: the prompt is read and nothing is generated
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
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None, 0 if self.max_tokens == 0 else None]
        of_prompt = max((n for n in asked if n is not None), default=None)
        return self.params(self.logprobs, of_prompt, most_tokens, defaults)
