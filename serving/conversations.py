"""The messages and tools of a chat, as clients write them.

fail_fast: of a million wrong items in a list only the first one is reported.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from serving.forms import Loose


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
        if self.role == "assistant" and content is None:
            content = ""  # as OpenAI's API has it beside calls, and some clients everywhere
        result = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.role == "assistant" and self.reasoning_content:
            result["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            result["tool_calls"] = [call.function.model_dump(include={"name", "arguments"}) for call in self.tool_calls]
        return result


class Function(Loose):
    """Its other keys are kept in the order they came in: the model reads them."""

    name: str = Field(min_length=1, max_length=128)

    @model_validator(mode="after")
    def has_a_schema(self):
        if not isinstance(self.model_extra.get("parameters"), dict | None):
            raise ValueError("parameters must be a JSON schema, an object")
        return self

    def signature(self) -> dict:
        """What its calls must match."""
        return {"name": self.name, "strict": self.model_extra.get("strict") is True,
                "parameters": self.model_extra.get("parameters")}  # fmt: skip


class Tool(Loose):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(Loose):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedNames(Loose):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True), Field(min_length=1, max_length=128)]


class AllowedTools(Loose):
    """A tool_choice among some of the tools, as if the others were not offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames
