"""A client for a model behind an OpenAI-compatible API, one question at a time; used by distillation and the judge."""

import urllib.parse
from dataclasses import dataclass
from functools import cached_property

from common.errors import UserError

# Errors raised when a reply that is no chat completion is read as if it were one.
NO_REPLY = (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError)
# Why an answer is not whole, by the server's finish_reason (OpenAI's, DeepSeek's); others name a natural end.
CUT_SHORT = {"length": "cut at max_tokens", "content_filter": "cut by the server's filter",
             "insufficient_system_resource": "cut off by the server"}  # fmt: skip


@dataclass(frozen=True)
class ChatApi:
    """Where to ask, and how."""

    base_url: str
    model: str
    api_key: str = ""
    max_tokens: int = 1024
    temperature: float = 0.7
    timeout: float = 120.0  # seconds
    retries: int = 5  # of one request, made by OpenAI's client: after 0.5, 1, 2, ... 8 s, or what Retry-After says

    def check(self, flag: str) -> None:
        """Raises UserError for an address or a key that no request can be sent with. flag: the address's."""
        try:
            address = urllib.parse.urlsplit(self.base_url)
            whole = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # a port that is no number
            whole = False
        if not whole:
            raise UserError(f"{flag} {self.base_url}: write it as http://HOST:PORT/v1")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the key (--api_key or OPENAI_API_KEY) must be one line of ASCII characters")

    @cached_property
    def client(self):
        import openai

        # The client requires a key; servers without keys ignore it. Redirections are not followed: the reply would come
        # from a server that the user did not name.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        return openai.OpenAI(base_url=self.base_url, api_key=self.api_key or "none", timeout=self.timeout,
                             max_retries=self.retries, http_client=http)  # fmt: skip

    def ask(self, messages: list[dict]) -> dict:
        """One request with its retries -> {"content", "reasoning_content", "tokens"} or {"failed": reason, "tokens"}.

        `reasoning_content` as in DeepSeek's API. Raises UserError where no request can succeed: a wrong key, address
        or model (not for 403, which a server that judges prompts answers to one of them).
        """
        import openai

        try:
            completion = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=self.max_tokens, temperature=self.temperature
            )
            return read_completion(completion)
        except openai.APIStatusError as error:
            said = error.response.text.strip()[:300]
            if error.response.is_redirect:
                to = error.response.headers.get("Location", "elsewhere")
                raise UserError(
                    f"{self.base_url} answers {error.status_code}: moved to {to}; name where it is"
                ) from None
            if error.status_code in (401, 404):
                raise UserError(f"{self.base_url} answers {error.status_code}: {said}") from None
            return {"failed": f"status {error.status_code}", "detail": said, "tokens": 0}
        except openai.OpenAIError as error:  # refused, reset, timed out, cut off: the cause says which
            return {"failed": type(error.__cause__ or error).__name__, "tokens": 0}
        except NO_REPLY:
            return {"failed": "no chat completion in the reply", "tokens": 0}


def read_completion(completion) -> dict:
    """The answer in a chat completion. The client checks nothing of what a server sends: any error of NO_REPLY."""
    choice = completion.choices[0]
    tokens = max(0, int(getattr(completion.usage, "total_tokens", None) or 0))
    content = (choice.message.content or "").strip()
    if choice.finish_reason in CUT_SHORT:
        return {"failed": CUT_SHORT[choice.finish_reason], "tokens": tokens}
    if not content:
        return {"failed": "empty answer", "tokens": tokens}
    thinking = (getattr(choice.message, "reasoning_content", None) or "").strip()
    (content + thinking).encode()  # half a surrogate pair cannot be written down
    return {"content": content, "tokens": tokens} | ({"reasoning_content": thinking} if thinking else {})
