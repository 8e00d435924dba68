"""Brings a record of any published shape into the three that the stages read (data/row_shapes.py names them).

  text  {"text"}                     from "text", "content" or the column that --text_key names
  chat  {"conversations": [...]}     from MiniMind v2/v3's and OpenAI's lists, ShareGPT's from/value, Alpaca's
                                     instruction/input/output, the columns history, q, a of MiniMind v1 and of its
                                     sft_data_zh (where `input` stands before q and `output` before a), and bare
                                     question/answer columns
  pair  {"chosen", "rejected"}       from two conversations, or from a prompt and two answers

A system text and tools beside any of them go into the system message. "any" takes every shape and joins its text: for
the tokenizer. Facts on MiniMind's files: its README and dataset code.
"""

import json

from data.row_shapes import (
    BadRow,
    as_json,
    as_pair,
    check_keys,
    check_messages,
    keys_of,
    record_text,
    turns_of,
    with_beside,
)
from model.chat_template import normalise_conversation

TEXT_KEYS = ("text", "content")
QUESTION_ANSWER = (("question", "answer"), ("prompt", "response"), ("prompt", "completion"), ("query", "response"))
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
KEPT_KEYS = ("role", "content", "reasoning_content", "tools", "tool_calls")


def to_row(record: dict, kind: str, text_key: str | None = None) -> dict:
    """The record as a row of `kind` "text", "chat", "pair" or "any"; raises BadRow."""
    if kind == "text":
        return {"text": _text(record, text_key)}
    if kind == "chat":
        return {"conversations": chat_of(record)}
    if kind == "pair":
        return pair_of(record)
    return {"text": _any_text(record, text_key)}


def knows(columns: list[str], kind: str, text_key: str | None = None) -> bool:
    """Whether a table with these columns can hold rows of `kind`: asked before any work is done."""
    has = set(columns).issuperset
    text = any(has({key}) for key in ((text_key,) if text_key else TEXT_KEYS))
    chat = any(map(has, ({"conversations"}, {"messages"}, {"q", "a"}, {"instruction", "output"}))) or any(
        has(keys) for keys in QUESTION_ANSWER
    )
    pair = has({"chosen"}) and (has({"rejected"}) or has({"reject"}))
    return {"text": text, "chat": chat, "pair": pair, "any": text or chat or pair}[kind]


def check_rendering(row: dict) -> None:
    """Raises BadRow for messages that the stages refuse: tools or calls that are no JSON, or on another's message."""
    try:
        for messages in row.values() if "text" not in row else ():
            normalise_conversation(messages)
    except ValueError as error:
        raise BadRow(str(error)) from None


# ------------------------------------------------------------------------------------------------------------- text
def _text(record: dict, text_key: str | None) -> str:
    key = text_key or next((key for key in TEXT_KEYS if key in record), "text")
    text = record.get(key)
    if key not in record:
        raise BadRow(f"no key {key!r} (found: {keys_of(record)})")
    if not isinstance(text, str):
        raise BadRow(f"{key!r} must be a string, not {_type(text)}")
    return text


def _any_text(record: dict, text_key: str | None) -> str:
    if text_key or any(key in record for key in TEXT_KEYS):
        return _text(record, text_key)
    return record_text(pair_of(record) if "chosen" in record else {"conversations": chat_of(record)})


# ------------------------------------------------------------------------------------------------------------- chat
def chat_of(record: dict) -> list[dict]:
    """The messages of a record of any chat shape, checked: user first, answers last, roles in turn."""
    # The order matters where a record has keys of several shapes: whole conversations first, then v1's columns, which
    # may stand beside `input` and `output`, then Alpaca's, then bare questions.
    if "conversations" in record or "messages" in record:
        messages = _messages(record.get("conversations", record.get("messages")))
    elif "q" in record and "a" in record:
        question = _string(record, "input") + _text(record, "q")
        messages = turns_of(record.get("history"), question, _string(record, "output") + _text(record, "a"))
    elif "instruction" in record and "output" in record:
        question = "\n".join(filter(None, (_string(record, "instruction"), _string(record, "input"))))
        messages = turns_of(record.get("history"), question, record["output"])
    else:
        keys = next((keys for keys in QUESTION_ANSWER if record.keys() >= set(keys)), None)
        if keys is None:
            raise BadRow(f"no conversation in it (found: {keys_of(record)})")
        messages = turns_of(record.get("history"), record[keys[0]], record[keys[1]])
    return _checked(_with_beside(messages, record))


def _messages(messages) -> list[dict]:
    """Role and content of each message; a message list written as JSON in a CSV cell is read too."""
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise BadRow("the conversation is a string that is not JSON") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("a conversation must be a list of messages")
    for i, message in enumerate(messages):
        check_keys(i, message)
    return [_message(message) for message in messages]


def _message(message: dict) -> dict:
    if "from" in message and "value" in message:  # ShareGPT
        role, value = message["from"], message["value"]
        if role == "function_call":  # one call, or a list of them, as JSON text
            calls = _json_text(value)
            calls = calls if calls.lstrip().startswith("[") else f"[{calls}]"
            return {"role": "assistant", "content": "", "tool_calls": calls}
        return {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": value}
    # Tables write a key into every message, with nothing in it where it does not apply: such keys go.
    kept = {key: message[key] for key in KEPT_KEYS if message.get(key) not in (None, "", [])}
    kept |= {key: _json_text(kept[key]) for key in ("tools", "tool_calls") if key in kept}
    return {"role": message.get("role"), "content": message.get("content") or "", **kept}


def _json_text(value) -> str:
    """Tools or calls as JSON text, which they may be already."""
    return value if isinstance(value, str) else as_json(value)


def _with_beside(messages: list[dict], record: dict) -> list[dict]:
    tools = record.get("tools")
    record = record if tools is None else record | {"tools": _json_text(tools)}
    return with_beside(check_messages(messages), record)


def _string(record: dict, key: str) -> str:
    """The string under a key that may be missing, or be null or another nothing."""
    value = record.get(key) or ""
    if not isinstance(value, str):
        raise BadRow(f"{key!r} must be a string, not {_type(value)}")
    return value


def _type(value) -> str:
    return "null" if value is None else type(value).__name__


def _checked(messages: list[dict]) -> list[dict]:
    while messages[-1]["role"] != "assistant":  # nothing is learned from a question without its answer
        messages = messages[:-1]
    # The stages could render other orders too. But two questions in a row mean that an answer is missing.
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if turns[0] != "user":
        raise BadRow(f"the first turn is {turns[0]}'s, not the user's")
    for before, after in zip(turns, turns[1:]):
        if before == after != "tool":
            raise BadRow(f"two {after} turns in a row")
    return messages


# ------------------------------------------------------------------------------------------------------------- pairs
def pair_of(record: dict) -> dict:
    """{"chosen", "rejected"} of a preference record of any shape."""
    chosen, rejected = record.get("chosen"), record.get("rejected", record.get("reject"))
    if chosen is None or rejected is None:
        raise BadRow(f'no "chosen" and "rejected" (found: {keys_of(record)})')
    prompt = _prompt(record)
    chosen, rejected = (_with_beside(_side(prompt, side), record) for side in (chosen, rejected))
    return as_pair({"chosen": chosen, "rejected": rejected})


def _prompt(record: dict) -> list[dict]:
    """The messages before the two answers; empty where chosen and rejected are whole conversations."""
    # A prompt is a list of messages or a text under one of several names; Alpaca's has its `input` beside it.
    key = next((key for key in ("conversations", "prompt", "question", "instruction") if key in record), "prompt")
    if isinstance(record.get(key), list):
        return _messages(record[key])
    text = "\n".join(filter(None, (_string(record, key), _string(record, "input"))))
    if not record.get(key):
        return []
    return [{"role": "user", "content": text}]


def _side(prompt: list[dict], side) -> list[dict]:
    if isinstance(side, str):
        side = [{"role": "assistant", "content": side}]
    messages = _messages([side] if isinstance(side, dict) else side)
    if any(message["role"] == "user" for message in messages):
        return messages  # a whole conversation, whatever stands beside it
    if not prompt:
        raise BadRow("an answer without its prompt")
    return [*prompt, *messages]
