"""The three shapes ("kinds") of a row, and the errors for rows that have none of them.

  text  a string                                       pretraining, tokenizer
  chat  [{"role", "content", ...}, ...]                SFT, LoRA, distillation, reasoning
  pair  {"chosen": messages, "rejected": messages}     preferences

Training reads only these. cleaning/published_shapes.py turns other published forms into them.
"""

import ast
import json

MAX_HISTORY_CHARS = 2**20
SHOWN_BYTES = 2_000  # of a row that cannot be read: enough to recognise it

ROLES = ("system", "user", "assistant", "tool")

TOLD = ("role", "content", "reasoning_content", "tools", "tool_calls")  # the keys that the chat template reads

# What a bad row raises: BadRow (a ValueError), or json's errors for surrogates, dates, or too many nested levels.
UNUSABLE = (ValueError, TypeError, RecursionError)


class BadRow(ValueError):
    """A row that cannot be used; the message says why. The caller adds file and line.

    Cleaning counts bad rows by `reason`, one of a few fixed phrases; `detail` says more. `row` is set where the bytes
    could not be read as a row at all: it holds the first of them.
    """

    reason, row = "wrong shape", None

    @property
    def detail(self) -> str:
        return str(self)


class Dropped(BadRow):
    """A bad row with a reason other than "wrong shape". data: the bytes, where they could not be read as a row."""

    def __init__(self, reason: str, detail: str = "", data: bytes = b""):
        super().__init__(reason, detail)
        self.reason = reason
        self.row = data[:SHOWN_BYTES].decode("utf-8", "backslashreplace") or None

    @property
    def detail(self) -> str:
        return self.args[1]

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


def parse(raw, kind: str):
    """One raw row in the shape "text", "chat" or "pair"; raises BadRow."""
    record = parse_record(raw)
    return {"text": as_text, "chat": as_chat, "pair": as_pair}[kind](record)


def parse_record(raw: str | dict | BadRow) -> dict:
    """A raw row (a line of JSON, or a dict already) as a dict. Raises BadRow; reading may have put one in place of the
    row, which is raised here, so that callers meet all bad rows in one place."""
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError covers JSON errors, and numbers with too many digits
        raise Dropped("not JSON", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow(f"a row must be a JSON object, not {type(record).__name__}")
    return record


def as_text(record: dict) -> str:
    """{"text": ...} -> the string."""
    text = record.get("text")
    if "text" not in record:
        raise BadRow(f'no key "text" (found: {keys_of(record)})')
    if not isinstance(text, str):
        raise BadRow(f'"text" must be a string, not {"null" if text is None else type(text).__name__}')
    if not text.strip():
        raise BadRow('"text" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which broken JSON writers produce
        raise BadRow(f'"text": character {error.start} is no valid Unicode') from None
    return text


def as_chat(record: dict) -> list[dict]:
    """{"conversations": [...]} (or "messages"), or the columns history, q, a of MiniMind v1 -> messages.

    Tools and a system text may stand beside them, see with_beside.
    """
    if "conversations" in record or "messages" in record:
        messages = record.get("conversations", record.get("messages"))
    elif "q" in record and "a" in record:
        messages = turns_of(record.get("history"), record["q"], record["a"])
    else:
        raise BadRow(f'no key "conversations" and no columns "q", "a" (found: {keys_of(record)})')
    return with_beside(check_messages(messages), record)


def as_pair(record: dict) -> dict:
    """{"chosen": [...], "rejected": [...]}: two conversations that differ in their last message only.

    Tools and a system text may stand beside them, see with_beside.
    """
    if "chosen" not in record or "rejected" not in record:
        raise BadRow(f'no keys "chosen" and "rejected" (found: {keys_of(record)})')
    chosen, rejected = check_messages(record["chosen"]), check_messages(record["rejected"])
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise BadRow("chosen and rejected must each end with an answer of the assistant")
    if len(chosen) == 1 or len(rejected) == 1:
        raise BadRow("chosen and rejected must be whole conversations: the answers stand without their prompt "
                     "(`data_process.py clean --to dpo` joins a prompt that stands beside them)")  # fmt: skip
    chosen, rejected = with_beside(chosen, record), with_beside(rejected, record)
    # Preference losses compare two answers to the same prompt. Compare only what the template reads: a score or a name
    # in a message does not make it another prompt.
    ours, theirs = ([_told(message) for message in messages] for messages in (chosen, rejected))
    if ours[:-1] != theirs[:-1]:
        raise BadRow("the prompts of chosen and rejected differ; they may differ in the last message only")
    if ours[-1] == theirs[-1]:
        raise BadRow("chosen and rejected are the same answer: there is nothing to prefer")
    return {"chosen": chosen, "rejected": rejected}


def _told(message: dict) -> dict:
    """The part of a message that the chat template turns into text: without scores, names and other keys."""
    return {key: message[key] for key in TOLD if message.get(key) is not None}


def with_beside(messages: list[dict], record: dict) -> list[dict]:
    """The messages, with "tools" and "system" of their row moved into the system message, which comes first.

    OpenAI's fine-tuning rows have "tools" beside the messages, ShareGPT's rows "system". Raises BadRow where the system
    message already has another value, and for OpenAI's older "functions".
    """
    if not _nothing(record.get("functions")):
        raise BadRow('"functions" is OpenAI\'s older form of "tools", and is not read; write them as "tools"')
    beside = {key: record[key] for key in ("system", "tools") if not _nothing(record.get(key))}
    if not beside:
        return messages
    if "system" in beside and not isinstance(beside["system"], str):
        raise BadRow('"system" must be a string')
    # The chat template looks for them in the system message, so one is made where there is none.
    has_one = messages[0]["role"] == "system"
    first = dict(messages[0]) if has_one else {"role": "system", "content": ""}
    for name, value in beside.items():
        key = "content" if name == "system" else name
        if not _nothing(first.get(key)) and first[key] != value:
            raise BadRow(f'"{name}" stands beside the messages, and their system message has {key} of its own')
        first[key] = value
    return [first, *messages[has_one:]]


def _nothing(value) -> bool:
    """Whether a value means "absent": tables have a cell for every key, and fill it with one of these."""
    return value is None or isinstance(value, str | list) and value in ("", "[]", [])


def check_messages(messages) -> list[dict]:
    """The messages, each with a string as content; BadRow if they cannot be rendered or hold no assistant turn."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("a conversation must be a list with at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"message {i} is not an object")
        if message.get("role") not in ROLES:
            raise BadRow(f"message {i} has role {message.get('role')!r}; roles are {', '.join(ROLES)}")
        check_keys(i, message)
        calls_only = message.get("content") is None and message.get("tool_calls")  # OpenAI writes null beside calls
        if not isinstance(message.get("content"), str) and not calls_only:
            raise BadRow(f'message {i} needs a string under "content"')
        if not isinstance(message.get("reasoning_content"), str | None):
            raise BadRow(f'message {i} needs a string under "reasoning_content"')
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("no assistant message: there is nothing to learn")
    return [message | {"content": message.get("content") or ""} for message in messages]


def check_keys(i: int, message: dict) -> None:
    """Raises BadRow for keys that this project does not read but that would change what is learned."""
    if message.get("function_call"):
        raise BadRow(f'message {i} has a "function_call", OpenAI\'s older form; write it as "tool_calls"')
    if message.get("role") == "assistant" and message.get("weight") not in (None, 1):
        raise BadRow(f'message {i} has "weight" {message["weight"]}, but every answer is learned; leave the row out')


def record_text(record: dict) -> str:
    """All text of a record of any of the three shapes, joined by newlines; tools and calls as JSON."""
    if "text" in record:
        return as_text(record)
    if "chosen" in record:
        pair = as_pair(record)
        messages = [*pair["chosen"], pair["rejected"][-1]]  # the common prompt once
    else:
        messages = as_chat(record)
    keys = ("reasoning_content", "content", "tools", "tool_calls")
    parts = [message[key] for message in messages for key in keys if message.get(key)]
    return "\n".join(part if isinstance(part, str) else as_json(part) for part in parts)


def as_json(value) -> str:
    """JSON text of tools or calls; BadRow for values that JSON has no form for (bytes, dates of a Parquet file)."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"tools or calls cannot be written as JSON: {error}") from None


def turns_of(history, question, answer) -> list[dict]:
    """The messages of the earlier turns (see parse_history), then of the last one."""
    messages = []
    for asked, answered in [*parse_history(history), (question, answer)]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def parse_history(cell) -> list:
    """The earlier turns, [[question, answer], ...]. MiniMind v1 writes them as a Python literal in one cell.

    literal_eval reads data and runs no code. It needs much memory for a long or deeply nested cell, hence the limit.
    """
    if cell is None or cell == "":
        return []
    if isinstance(cell, str):
        if len(cell) > MAX_HISTORY_CHARS:
            raise BadRow(f"the history cell is longer than {MAX_HISTORY_CHARS} characters")
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise BadRow("the history cell is not a list of [question, answer]") from None
    if not isinstance(cell, list | tuple) or any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in cell):
        raise BadRow("the history cell is not a list of [question, answer]")
    return list(cell)


def keys_of(record: dict) -> str:
    return ", ".join(map(str, list(record)[:8])) or "none"
