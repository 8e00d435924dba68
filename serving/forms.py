"""What a request says about the form of its answer, in the spellings of OpenAI, vLLM and llama.cpp -> one Grammar.

  OpenAI      response_format, tool_choice, strict tools
  vLLM        structured_outputs, and the older guided_json, guided_regex, guided_choice, guided_grammar
  llama.cpp   json_schema, grammar

What llguidance cannot hold is refused with 400, in words.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference.grammar import JSON_OBJECT, Grammar, calls, one_call, refusal
from serving.errors import ApiError

MOST_CALLS = 8  # in one answer that must call


class Loose(BaseModel):
    """Unknown fields are accepted: clients send many that concern other servers (user, metadata, store, ...)."""

    model_config = ConfigDict(extra="allow")


class JsonSchema(Loose):
    """strict or not, the answer is held to it: a schema that cannot be is refused."""

    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Loose):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="with json_object: llama.cpp's spelling")

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        schema = self.schema_
        if self.type == "json_schema":
            schema = self.json_schema.schema_ if self.json_schema else schema
            if schema is None:
                raise ValueError("response_format of type json_schema needs json_schema.schema")
        return JSON_OBJECT if schema is None else Grammar.json(schema)


class StructuredOutputs(BaseModel):
    """vLLM's; what would change the answer and is not done here is no field, and refused."""

    model_config = ConfigDict(extra="forbid")
    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None  # JSON has ", " and ": " here, whatever a request says

    def grammars(self) -> list[Grammar]:
        return [
            make(given)
            for make, given in (
                (Grammar.json, self.json_), (lambda text: Grammar("regex", text), self.regex),
                (Grammar.choice, self.choice), (lambda text: Grammar("grammar", text), self.grammar),
                (lambda _: JSON_OBJECT, self.json_object or None),
            )
            if given is not None
        ]  # fmt: skip


class Formed(Loose):
    """The fields of a request that say what form its answer must have: one of them, or none."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def one_form(self):
        self.asked_form()
        return self

    def asked_form(self) -> Grammar | None:
        older = StructuredOutputs(
            json=self.guided_json, regex=self.guided_regex or None, choice=self.guided_choice or None,
            grammar=self.guided_grammar or None,
        )  # fmt: skip
        newer = StructuredOutputs(json=self.json_schema, grammar=self.grammar or None)
        found = [*older.grammars(), *newer.grammars()]
        found += self.structured_outputs.grammars() if self.structured_outputs else []
        found += [form] if self.response_format and (form := self.response_format.grammar()) else []
        if len(found) > 1:
            raise ValueError("an answer has one form; this request asks for several (response_format, guided_...)")
        return found[0] if found else None


def chat_grammar(form: Grammar | None, tools: list[dict], must_call: bool, one: bool, tags: dict) -> Grammar | None:
    """What a chat's answer must match, tools and all. Raises ValueError for what does not go together.

    tools: the functions that may be called, {"name", "parameters", "strict"}; one: at most one of them; tags: the
    vocabulary's tokens for <tool_call> and </tool_call>.
    """
    strict = any(tool.get("strict") for tool in tools)
    if not tools or not (must_call or form or strict):
        return form
    pair = tags["<tool_call>"], tags["</tool_call>"]
    if None in pair:
        raise ValueError("calls cannot be held to their form: this model's vocabulary has no token <tool_call>")
    if must_call:
        return calls(tools, pair, 1 if one else MOST_CALLS)
    if form is None:
        return one_call(tools, pair)
    if form.kind != "json":
        raise ValueError("an answer in the form of a regex, a choice or a grammar is no tool call: tool_choice: none")
    return calls(tools, pair, 1 if one else MOST_CALLS, answer=form)


class FormCheck:
    """Which grammars can be held: each is tried in a process of its own, one after the other, and remembered."""

    KEPT, WAITING = 256, 16

    def __init__(self, prepare: Callable[[Grammar], None]):
        """prepare: compiles it here, once it is known to take little; ValueError where that fails."""
        self.prepare = prepare
        self.faults: OrderedDict[Grammar, str] = OrderedDict()
        self.waiting = 0
        # One thread: strangers' schemas take one core of this machine, not all, and no thread that prompts need.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")

    async def check(self, grammar: Grammar | None) -> None:
        """Raises ApiError 400 in words, 429 where too many wait to be tried."""
        if grammar is None:
            return
        if grammar not in self.faults:
            if self.waiting >= self.WAITING:
                raise ApiError(429, "too many new schemas at once; try again soon", headers={"Retry-After": "1"})
            self.waiting += 1
            try:
                fault = await asyncio.get_running_loop().run_in_executor(self.thread, self._fault, grammar)
            finally:
                self.waiting -= 1
            self.faults[grammar] = fault
            if len(self.faults) > self.KEPT:
                self.faults.popitem(last=False)
        if self.faults[grammar]:
            raise ApiError(400, self.faults[grammar], "unsupported_form")

    def _fault(self, grammar: Grammar) -> str:
        try:
            if fault := refusal(grammar):
                return fault
            self.prepare(grammar)
        except ValueError as error:
            return str(error)
        return ""
