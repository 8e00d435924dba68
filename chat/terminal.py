"""Chat in a terminal: prompts from files, questions as they are typed, answers printed as they come."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from inference.stream_text import ThinkingStream

DIM, PLAIN = "\033[2m", "\033[0m"


def read_prompts(path) -> list[dict]:
    """A file of prompts -> rows with "prompt": a text, or messages (of "conversations", its last answer left out).

    .jsonl: objects with "prompt", "question" or "conversations", other keys are kept; else one prompt a line.
    """
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _json_row(line, f"{path}:{number}") if path.suffix == ".jsonl" else {"prompt": line.strip()}
            rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _json_row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    for key in ("prompt", "question", "conversations"):
        if row.get(key) and isinstance(row[key], list if key == "conversations" else str):
            return row | {"prompt": row[key] if isinstance(row[key], str) else _question_of(row[key], where)}
    raise ValueError(f'{where}: no "prompt" or "question" that is a text, no "conversations"')


def _question_of(messages: list, where: str) -> list[dict]:
    """A conversation without its last answer."""
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: "conversations" must be a list of messages')
    messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
    if not messages:
        raise ValueError(f"{where}: the conversation asks nothing")
    return messages


def as_messages(prompt, system: str | None = None) -> list[dict]:
    """A text or messages -> messages, with the system message in front where there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def typed(forget) -> Iterator[str]:
    """The questions of a chat, until an empty line, Ctrl-D or Ctrl-C; at /clear forget() is called."""
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/clear":
            forget()
        elif question:
            yield question
        else:
            return


def thought_marks() -> tuple[str, str]:
    """What is printed before and after thinking: dimmed on a terminal, between words elsewhere."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return (DIM, PLAIN) if colour else ("[thinks] ", " [/thinks]\n")


def print_stream(pieces, thinking: bool = False) -> str:
    """Prints pieces as they come, thinking dimmed (between marks where the output is no terminal) -> the whole text."""
    begin, end = thought_marks()
    stream, text, in_thought = ThinkingStream(thinking), "", False
    try:
        for piece in pieces:
            text += piece.text
            for thought, part in stream.feed(piece.text, final=piece.finish_reason is not None):
                if thought != in_thought:
                    print(begin if thought else end, end="")
                    in_thought = thought
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")  # Ctrl-C ends this answer, not the program
    print(end if in_thought else "")
    return text


def note(text: str) -> None:
    """A remark that is no part of the answer: standard error."""
    print(text, file=sys.stderr, flush=True)
