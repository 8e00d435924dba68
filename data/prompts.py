"""Prompts from a file: what the chat programs, the scored questions and a teacher are asked."""

import json
from pathlib import Path

from common.errors import UserError
from data.files import kind_of
from data.reading import raw_rows
from data.row_shapes import UNUSABLE, BadRow, parse_record, with_beside


def read_prompts(path) -> list[dict]:
    """The rows of a data file, each with "prompt": a text, or the messages of a conversation without its last answer.

    A .txt or .md file has one prompt a line. Rows of other kinds hold "prompt", "question" or "conversations"; their
    other keys are kept. "line" says where in the file a row stands. UserError, with file and line, for a row without a
    prompt.
    """
    rows = []
    for line, raw in raw_rows(path, txt_rows="line"):
        try:
            row = parse_record(raw)
            prompt = row["text"].strip() if kind_of(Path(path)) in (".txt", ".md") else _prompt(row)
            # Every prompt is sent or written as JSON later. Half of a surrogate pair, or a date from a Parquet file,
            # would fail there, when other prompts have been answered already.
            json.dumps(prompt, ensure_ascii=False).encode()
        except UNUSABLE as error:
            raise UserError(f"{path}:{line}: {error}") from None
        rows.append(row | {"prompt": prompt, "line": line})
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


def _prompt(row: dict) -> str | list[dict]:
    for key in ("prompt", "question"):
        if isinstance(row.get(key), str) and row[key].strip():
            return row[key]
    messages = row.get("conversations") or row.get("messages")
    if not messages:
        raise BadRow('no text under "prompt" or "question" and no "conversations"')
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise BadRow('"conversations" must be a list of messages')
    messages = with_beside(messages, row)
    # Files of training rows end with an answer. It is left out, because it is what the model is asked for.
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "system":
        raise BadRow("the conversation asks nothing")
    return messages


def as_messages(prompt: str | list[dict], system: str | None = None) -> list[dict]:
    """A text or messages -> messages, with the system message in front where there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages
