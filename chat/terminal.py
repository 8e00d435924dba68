"""Chat in a terminal: questions as they are typed, answers printed as they come."""

import os
import sys
from collections.abc import Iterator

from inference.stream_text import ThinkingStream

DIM, PLAIN = "\033[2m", "\033[0m"


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
