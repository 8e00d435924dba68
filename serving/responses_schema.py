"""The body of POST /v1/responses, OpenAI's newer API, and the chat that it asks for.

Nothing is stored here: a request carries its whole conversation. What needs a store is refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.errors import ApiError, validated
from serving.forms import Loose
from serving.schema import ChatRequest, refuse

REFUSED = {
    "previous_response_id": "nothing is stored here; send the conversation as input",
    "conversation": "nothing is stored here; send the conversation as input",
    "background": "an answer comes with its request",
    "prompt": "there are no stored prompts here",
    "top_logprobs": "log-probabilities come with /v1/chat/completions",
    "max_tool_calls": "the tools are yours to call",
}
TEXTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text", "refusal")
# Fields of a chat that mean the same here.
SAME = ("model", "temperature", "top_p", "parallel_tool_calls", "stream", "top_k", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "seed", "stop", "logit_bias", "ignore_eos", "bad_words",
        "allowed_token_ids", "chat_template_kwargs", "open_thinking")  # fmt: skip


class InputPart(Loose):
    type: str = "text"
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[list[InputPart], Field(fail_fast=True)]


class InputItem(Loose):
    """A message, what the model thought, a call it made, or what came of it."""

    type: str = "message"
    role: str | None = None
    content: Content | None = None
    summary: list[InputPart] | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None


class TextFormat(Loose):
    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextConfig(Loose):
    format: TextFormat | None = None


class ResponsesRequest(Loose):
    model: str
    input: str | Annotated[list[InputItem], Field(fail_fast=True), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stream: bool | None = None
    truncation: str | None = None
    include: list[str] | None = None

    @model_validator(mode="after")
    def nothing_dropped(self):
        refuse(self, REFUSED)
        if self.truncation not in (None, "disabled"):
            raise ValueError("truncation is not supported: shorten the input")
        if "message.output_text.logprobs" in (self.include or []):
            raise ValueError(f"include is not supported: {REFUSED['top_logprobs']}")
        form = self.text and self.text.format
        if form and form.type == "json_schema" and form.schema_ is None:
            raise ValueError("text.format of type json_schema needs a schema")
        return self

    def chat(self) -> ChatRequest:
        """The same request as a chat. RequestValidationError where it is none."""
        fields = {name: value for name in SAME if (value := getattr(self, name, None)) is not None}
        # A last message of the assistant is history here: the answer is a turn of its own.
        fields |= {"messages": self._messages(), "max_tokens": self.max_output_tokens, "add_generation_prompt": True}
        if self.tools:
            fields["tools"] = [function_of(tool) for tool in self.tools]
        if self.tool_choice:
            fields["tool_choice"] = choice_of(self.tool_choice)
        if self.text and self.text.format:
            form = self.text.format
            fields["response_format"] = {"type": form.type, "json_schema": {"schema": form.schema_}}
        return validated(ChatRequest, fields)

    def _messages(self) -> list[dict]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            add_item(messages, item)
        return messages


def add_item(messages: list[dict], item: InputItem) -> None:
    """One item of the input. What the assistant thought, said and called in a turn becomes one message."""
    if item.type == "function_call_output":
        messages.append({"role": "tool", "content": text_of(item.output)})
        return
    if item.type == "message" and item.role != "assistant":
        messages.append({"role": item.role, "content": text_of(item.content)})
        return
    if item.type not in ("message", "reasoning", "function_call"):
        raise ApiError(400, f"an input item of type {item.type!r} is not supported", param="input")
    if not messages or messages[-1]["role"] != "assistant" or (item.type == "reasoning" and messages[-1]["content"]):
        messages.append({"role": "assistant", "content": ""})
    turn = messages[-1]
    if item.type == "message":
        turn["content"] += text_of(item.content) or ""
    elif item.type == "reasoning":
        turn["reasoning_content"] = text_of(item.content or item.summary) or ""
    else:
        function = {"name": item.name, "arguments": item.arguments or ""}
        turn.setdefault("tool_calls", []).append({"type": "function", "function": function})


def text_of(content: str | list[InputPart] | None) -> str | None:
    if not isinstance(content, list):
        return content
    for part in content:
        if part.type not in TEXTS:
            raise ApiError(
                400, f"a part of type {part.type!r} cannot be read; the model reads text only", param="input"
            )
    return "".join(part.text or part.refusal or "" for part in content)


def choice_of(choice: str | dict) -> str | dict:
    """A tool_choice as chats have it."""
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "allowed_tools":
        return named(choice)
    tools = choice["tools"] if isinstance(choice.get("tools"), list) else []
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": list(map(named, tools))}}


def named(choice) -> dict:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind != "function":
        raise ApiError(400, f"{kind!r:.60} cannot be chosen: the tools are functions", param="tool_choice")
    return {"type": "function", "function": choice}


def function_of(tool: dict) -> dict:
    """A tool as chats have it."""
    if tool.get("type") != "function":
        raise ApiError(
            400, f"a tool of type {tool.get('type')!r:.60} is not supported: they are functions", param="tools"
        )
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}
