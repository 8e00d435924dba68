"""Chat in a terminal: questions as they are typed, answers printed as they come."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

from chat.abilities import Abilities
from chat.sources import Refused, Settings
from chat.words import Words
from common.words import language_here

CHINESE = re.compile("[\u4e00-\u9fff]")
LEAVE = ("", "exit", "quit")
DIM, PLAIN = "\033[2m", "\033[0m"


def typed(forget) -> Iterator[str]:
    """The questions of a chat, until exit, quit, an empty line, Ctrl-D or Ctrl-C. At /clear it calls forget()."""
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question.lower() in LEAVE:
            return
        if question == "/clear":
            forget()
        else:
            yield question


def introduction(can: Abilities, say: Words) -> list[str]:
    """The chat's first lines: what the model was taught, as far as its record tells, and how to leave."""
    if can.chats is False:
        return [say("base"), say("leave")]
    forms = {name: getattr(can, name) for name in ("several_turns", "thinking", "tools")}
    lines = [
        say(key, forms=say("and").join(say(name) for name in names))
        for key, wanted in (("taught", True), ("not_taught", False))
        if (names := [name for name, held in forms.items() if held is wanted])
    ]
    if can.examples:  # those in the reader's language, where there are any
        readable = [text for text in can.examples if bool(CHINESE.search(text)) == (say.language == "zh")]
        lines += [say("examples", questions="  ".join((readable or can.examples)[:3])), say("small")]
    return [*lines, say("leave")]


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


def converse(source, settings: Settings, can: Abilities, answered: Callable[[], None] = lambda: None) -> None:
    """Asks the source (chat/sources.py) each question of typed(). answered: is called after each answer."""
    note("\n".join(introduction(can, Words(language_here()))))
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
