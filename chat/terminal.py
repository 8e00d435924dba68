"""Chat in a terminal: prompts from files, questions as they are typed, answers printed as they come."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from chat.sources import Refused, Settings

DIM, PLAIN = "\033[2m", "\033[0m"


def read_prompts(path) -> list[dict]:
    """A file of prompts -> rows with "prompt": a text, or messages; and "line", its number.

    .jsonl: objects with "prompt", "question" or "conversations", whose last answer is left out; other keys are kept.
    Any other file: one prompt a line. Raises ValueError.
    """
    path, rows = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also cut at U+2028
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
    """The questions of a chat, until an empty line, Ctrl-D or Ctrl-C. At /clear it calls forget()."""
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


def print_answer(parts) -> str:
    """Prints an answer as it comes, thinking dimmed (between marks where the output is no terminal) -> its content.

    parts: ("reasoning" or "content", text). Ctrl-C ends this answer, not the program.
    """
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    begin, end = (DIM, PLAIN) if colour else ("[thinks] ", " [/thinks]\n")
    said, thinking = "", False
    try:
        with contextlib.closing(parts):  # closed at once after Ctrl-C: a server then frees the answer's row
            for kind, text in parts:
                if thinking != (kind == "reasoning"):
                    thinking = not thinking
                    print(begin if thinking else end, end="")
                print(text, end="", flush=True)
                said += "" if thinking else text
    except KeyboardInterrupt:
        print(" ...", end="")
    print(end if thinking else "")
    return said


def converse(source, settings: Settings, answered: Callable[[], None] = lambda: None) -> None:
    """Asks the source (chat/sources.py) each question of typed(). answered: is called after each answer."""
    messages: list[dict] = []
    for question in typed(forget=messages.clear):
        messages.append({"role": "user", "content": question})
        try:
            said = print_answer(source.stream(messages, settings))
        except Refused as refusal:  # the server is full, say: the chat goes on, without the question
            note(str(refusal))
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})
        answered()


def note(text: str) -> None:
    """Prints a remark that is not part of the answer, to standard error."""
    print(text, file=sys.stderr, flush=True)
