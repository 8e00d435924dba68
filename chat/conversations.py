"""The chats of a visitor: several of them, edited, asked again, read from a file. Lists of messages, and no page.

A message has OpenAI's keys (role, content, tool_calls, ...), and the page's own: "stopped", "usage", and "earlier", the
answers that were given before it to the same question.
"""

import json

MOST_BYTES = 2**21  # of a file to be read
ROLES = ("user", "assistant", "tool")
TITLE = 18  # characters


def title_of(messages: list[dict]) -> str:
    """The first question, in short; "" for an empty chat."""
    first = next((message["content"] for message in messages if message["role"] == "user"), "")
    first = " ".join(first.split())
    return first if len(first) <= TITLE else first[: TITLE - 1] + "…"


def edited(messages: list[dict], place: int, text: str) -> list[dict]:
    """A copy up to the question at `place`, which now says `text`: an answer is to follow."""
    return [*messages[:place], {"role": "user", "content": text}]


def asked_again(messages: list[dict]) -> tuple[list[dict], list[str]]:
    """-> (the messages up to the last question, the answers given to it so far, the newest last)."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    given = [message for message in messages[last + 1 :] if message["role"] == "assistant"]
    earlier = [text for message in given for text in message.get("earlier", [])]
    return messages[: last + 1], earlier + [message["content"] for message in given[-1:] if message["content"]]


def imported(raw: bytes) -> tuple[list[dict], str]:
    """A chat as `exported` writes it, or a list of OpenAI's messages -> (messages, system prompt).

    Raises ValueError for anything else.
    """
    if len(raw) > MOST_BYTES:
        raise ValueError(f"not a chat: the file has {len(raw):,} bytes")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("not a chat: it is not JSON") from None
    if isinstance(found, dict):
        found = found.get("conversations", found.get("messages"))
    if not isinstance(found, list) or not all(map(_is_message, found)):
        raise ValueError("not a chat: a list of messages with role and content was expected")
    system = found[0]["content"] if found and found[0]["role"] == "system" else ""
    messages = found[1:] if system else found
    if not messages or any(message["role"] not in ROLES for message in messages):
        raise ValueError("not a chat: it holds no question")
    keys = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")
    return [{key: message[key] for key in keys if key in message} for message in messages], system


def _is_message(message) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        return False
    calls = message.get("tool_calls", [])
    text = (message.get(key, "") for key in ("reasoning_content", "tool_call_id"))
    return (
        message.get("role") in ("system", *ROLES)
        and all(isinstance(one, str) for one in text)
        and isinstance(calls, list)
        and all(isinstance(call, dict) and _names_a_function(call.get("function")) for call in calls)
    )


def _names_a_function(function) -> bool:
    return isinstance(function, dict) and all(isinstance(function.get(key), str) for key in ("name", "arguments"))
