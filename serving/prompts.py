"""From a request to the token ids of its prompts. What cannot fit is refused, a long text before it is tokenised."""

import logging

from inference.engine import Engine
from model.chat_template import to_json
from serving.errors import ApiError
from serving.schema import ChatRequest, CompletionRequest, Sampling

log = logging.getLogger(__name__)


def spoken(messages: list[dict]) -> list[str]:
    """The texts of messages."""
    texts = [message.get(key) or "" for message in messages for key in ("content", "reasoning_content")]
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    return texts + [a if isinstance(a := call["arguments"], str) else to_json(a) for call in calls]


class Prompts:
    """The prompts of requests to one engine. All methods raise ApiError, and may take milliseconds."""

    def __init__(self, engine: Engine, ignore_tools: bool = False):
        """ignore_tools: offered tools are not shown to the model, whatever a request says."""
        self.engine, self.ignore_tools = engine, ignore_tools
        self.longest = max(map(len, engine.token_bytes))  # bytes that one token can stand for
        self.told: set[int] = set()  # sizes of tool sets that the log has named

    # -------------------------------------------------------------------------------------------------------- chats
    def chat(self, body: ChatRequest) -> tuple[list[int], list, str | None]:
        """-> token ids, the tools that the model is shown, and why it is shown none where some were offered."""
        tools, why = ([], "the server ignores tools") if self.ignore_tools and body.offered else (body.offered, None)
        if self.ignore_tools and body.must_call:
            raise ApiError(400, "tool_choice asks for a call, and this server ignores tools", param="tool_choice")
        if tools and not body.must_call and (alone := self._size_of(tools)) >= self.engine.context:
            # A page's built-in tools, as a rule: its user did not offer them and cannot see what fills the context.
            why = f"{len(tools)} tools take {alone} tokens; the context has {self.engine.context}"
            if alone not in self.told:
                log.warning("tools are left out: %s", why)
            self.told = set(list(self.told)[-100:]) | {alone}
            tools = []
        messages = [message.plain() for message in body.messages]
        if body.truncate_prompt_tokens is None:
            self._check_bytes([*spoken(messages), *self._written(tools)], "messages", body)
        ids = self.rendered(messages, tools, body.thinking, body.continued)
        return self._fitting(ids, "messages", body), tools, why

    def rendered(self, messages: list[dict], tools: list, thinking=None, continued=False) -> list[int]:
        # `strict` is for the grammar; the model has learned signatures without it.
        written = [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools] or None
        try:
            return self.engine.encode(messages, written, thinking, continued)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        except RecursionError:
            raise ApiError(400, "messages or tools are nested too deeply", param="tools") from None

    def _written(self, tools: list) -> list[str]:
        try:
            return [to_json(tool.model_dump(exclude_unset=True)) for tool in tools]
        except (ValueError, RecursionError):
            raise ApiError(400, "tools are nested too deeply", param="tools") from None

    def _size_of(self, tools: list) -> int:
        """Tokens that the tools take, at least."""
        least = sum(len(text) for text in self._written(tools)) // self.longest
        if least >= self.engine.context:
            return least
        return len(self.rendered([{"role": "user", "content": ""}], tools))

    # -------------------------------------------------------------------------------------------------------- texts
    def texts(self, body: CompletionRequest) -> list[list[int]]:
        """The prompts of a completion, each as token ids."""
        try:
            return [self._fitting(self._encoded(prompt, body), "prompt", body) for prompt in body.prompts]
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from None

    def _encoded(self, prompt: str | list[int], body: CompletionRequest) -> list[int]:
        if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
            self._check_bytes([prompt], "prompt", body)
        elif isinstance(prompt, str):  # the end that is kept; as many characters as so many tokens can have
            prompt = prompt[-self._kept(body) * self.longest :]
        return self.engine.encode(prompt)

    # ------------------------------------------------------------------------------------------------------- lengths
    def _check_bytes(self, texts: list[str], param: str, body: Sampling) -> None:
        """Tokenising a megabyte takes a second and a hundred megabytes; that it is too long is known without."""
        least = sum(len(text.encode("utf-8", "replace")) for text in texts) // self.longest
        if least > self._room(body):
            raise self._too_long(f"have at least {least} tokens", param)

    def _kept(self, body: Sampling) -> int:
        """truncate_prompt_tokens; -1: as many as leave room for max_tokens."""
        wanted = body.truncate_prompt_tokens
        if wanted > self.engine.context:
            text = f"truncate_prompt_tokens is {wanted}; the context has {self.engine.context}"
            raise ApiError(400, text, param="truncate_prompt_tokens")
        return wanted if wanted > 0 else max(self.engine.context - max(body.wanted_tokens or 1, 1), 1)

    def _room(self, body: Sampling) -> int:
        """Tokens of a prompt, at most: one of the context is left for the answer, if there is to be one."""
        return self.engine.context - (body.wanted_tokens != 0)

    def _fitting(self, ids: list[int], param: str, body: Sampling) -> list[int]:
        if body.truncate_prompt_tokens is not None:
            ids = ids[-self._kept(body) :]
        if len(ids) > self._room(body):
            raise self._too_long(f"have {len(ids)} tokens", param)
        return ids

    def _too_long(self, what: str, param: str) -> ApiError:
        # The words are OpenAI's: clients look for them, to shorten a conversation and ask again.
        text = (
            f"This model's maximum context length is {self.engine.context} tokens. However, your {param} {what}, and "
            f"the answer needs room. Please reduce the length of the {param}."
        )
        return ApiError(400, text, "context_length_exceeded", param=param)
